"""The log of a run: losses, figures and pictures => progress bar, log.jsonl and TensorBoard."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.training import check_losses


class RunLog:
    """Keeps losses on the device between two lines of the log, so that no step waits for the host.

    Use it in `with`. Lines are appended: a run that goes on continues its log, from which the
    lines of steps that will be taken again are dropped first.

    Args:
        workdir: gets log.jsonl and tensorboard/.
        steps: length of the run.
        start: steps that were taken before.
        batch_size: images of a step, for the throughput.
        writes: False on hosts that only look at the losses.
        images_at_peak: images a second at the devices' peak, see flops.py, if that is known.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        start: int,
        batch_size: int,
        writes: bool = True,
        images_at_peak: float | None = None,
    ):
        from tensorboardX import SummaryWriter

        self._path = workdir / "log.jsonl"
        self._writes = writes
        if writes:
            drop_later_lines(self._path, start)
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start + 1, write_to_disk=writes
        )
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc="train",
            unit="step",
            smoothing=0.05,
            disable=not writes,
        )
        self._batch_size, self._images_at_peak = batch_size, images_at_peak
        self._shown: dict[str, float] = {}
        self._start_window()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._bar.close()
        self._board.close()

    def add_step(self, metrics: dict[str, jax.Array], waited: float) -> None:
        """Notes a step: its metrics, left on the device, and the seconds it waited for its data."""
        self._metrics.append(metrics)
        self._waited += waited
        self._bar.update()

    def close_window(self, step: int) -> dict[str, float]:
        """Averages the metrics since the last window; waits for the device.

        Returns:
            The means, "images_per_second", "share_of_peak" if that is known, and
            "waited_for_data", the share of the time.

        Raises:
            FloatingPointError: if a loss, or another of the metrics, is no longer a number.
        """
        fetched = jax.device_get(self._metrics)
        if not fetched:
            return {}
        means = {key: float(np.mean([m[key] for m in fetched])) for key in fetched[0]}
        seconds = time.perf_counter() - self._began
        # A loss is that of the weights before its step: the gradient says what the step did.
        for name in ("loss", *means):
            check_losses(np.asarray([m[name] for m in fetched]), step, name)
        figures = {"images_per_second": len(fetched) * self._batch_size / seconds}
        if self._images_at_peak:
            figures["share_of_peak"] = figures["images_per_second"] / self._images_at_peak
        figures["waited_for_data"] = self._waited / seconds
        self._start_window()
        return means | figures

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line, and shows loss, held-out loss and throughput beside the bar."""
        if not self._writes:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        # Figures of quality, which have a slash in their names, are too many for a bar.
        self._shown |= {k: v for k, v in values.items() if k != "grad_norm" and "/" not in k}
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in self._shown.items()})

    def write_images(self, step: int, images: np.ndarray, captions: Any) -> None:
        """Adds pictures (n H W 3) in [-1, 1] to TensorBoard, each under its caption."""
        for caption, image in zip(captions, images, strict=True):
            self._board.add_image(caption, (image + 1) / 2, step, dataformats="HWC")

    def restart_clock(self) -> None:
        """Leaves out of the throughput what was done since the window was closed."""
        self._began = time.perf_counter()

    def _start_window(self):
        self._metrics: list[dict[str, jax.Array]] = []
        self._waited = 0.0
        self._began = time.perf_counter()


def drop_later_lines(path: Path, step: int) -> None:
    """Keeps the whole lines of a log up to `step`: what a run that was killed may have written
    after its last checkpoint, half a line perhaps, is dropped. The file is replaced at once.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _get_step(line) <= step]
    if kept != lines:
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)


def _get_step(line: bytes) -> float:
    """The step of a line of the log; beyond every step if the line is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, TypeError, KeyError):
        return float("inf")
