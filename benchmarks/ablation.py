"""From configs/seed.py to configs/emoji.py, one change at a time => what each is worth.

    python -m benchmarks.ablation --minutes=3 --out=runs/ablation
    python -m benchmarks.ablation --minutes=3 --out=runs/ablation --rows="log-normal noise levels"

Each row trains with its change and those of all rows before it, on the emoji, for the same minutes
of training on this machine: a probe of a few steps tells how many steps those are, a tenth of which
a warm-up takes at most, but for a guide's. A row that changes nothing but the sampler draws with
the weights of the row before it. Then it is measured as evaluate.py does, on the same captions from
the same noise. OUT gets a folder for each row, and the table as table.md, anew after each. A row
that is measured is not run again, so the same command goes on where it was. The emoji are encoded
first, where that was not done.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

from configs import seed
from encode import encode
from evaluate import evaluate
from ldm_jax.compiled import keep_compiled
from ldm_jax.emoji_styles import DEFAULT_STYLES, STYLES
from ldm_jax.exports import GUIDE, export_model
from ldm_jax.models import load_model
from train import train


class Row(NamedTuple):
    """A change: its name in the table, the keys that it sets, and those of a guide's config.

    With `guide` the pictures are guided by a weaker network, of the row's config with these keys.
    """

    name: str
    changes: Mapping[str, Any]
    guide: Mapping[str, Any] = {}


MEASURED_STYLES = tuple(key for key in DEFAULT_STYLES if STYLES[key].measured)
ROWS = (
    Row(
        "the original",
        {
            "data.source": "emoji",
            "data.styles": MEASURED_STYLES,
            "encoders.vae": "bundled:emoji",
            "encoders.text": "use",
            "network.dtype": "bfloat16",
        },
    ),
    Row(
        "log-normal noise levels",
        {"noising.noise_law": "log_normal", "noising.p_mean": -1.0, "noising.p_std": 1.4},
    ),
    Row("updated as trained", {"sampling.mixture": "variance_preserving"}),
    Row(
        "DPM-Solver++(2M)",
        {
            "sampling.method": "dpm_solver_pp_2m",
            "sampling.schedule": "log_snr",
            "sampling.diffusion_steps": 13,
        },
    ),
    Row("guidance 3", {"sampling.class_guidance": 3.0}),
    Row("channels apart", {"latents.normalisation": "channel", "latents.deviations": 3.0}),
    Row(
        "fewer weights",
        {"network.block_depth": 2, "network.widths": (128, 160, 160), "batch_size": 512},
    ),
    Row(
        "scaled heads",
        {"network.heads": 4, "network.scaled": True, "network.key_fraction": 2},
    ),
    Row("group norm", {"network.norm": "group"}),
    Row(
        "warm-up decay and clipping",
        {
            "optimizer.learning_rate": 2e-3,
            "optimizer.warmup_steps": 500,
            "optimizer.decay": "cosine",
            "optimizer.clip_norm": 1.0,
        },
    ),
    Row("longer average", {"training.ema_decay": 0.9995}),
    Row("dropout", {"network.dropout": 0.1}),
    Row("name and style apart", {"encoders.text": "use-parts", "network.emb_size": 1024}),
    Row("style guided apart", {"sampling.style_guidance": 5.0}),
    Row("adaptive conditioning", {"network.conditioning": "adaptive"}),
    Row("velocity by squares", {"noising.target": "velocity", "training.loss": "mse"}),
    Row("three styles to train on alone", {"data.styles": ()}),
    Row("more weights", {"network.widths": (192, 320, 384), "network.dropout": 0.15}),
    Row("moved pictures", {"training.translation": 0.5}),
    Row(
        "larger batch",
        {"batch_size": 2048, "optimizer.learning_rate": 1.3e-3, "optimizer.warmup_steps": 1000},
    ),
    Row(
        "guided by a weaker network",
        {"sampling.class_guidance": 3.0, "sampling.style_guidance": 3.5},
        {"steps": 1_200, "network.widths": (128, 160, 160), "optimizer.decay": "constant"},
    ),
)


DONE = "quality/quality.json"
INTERVAL = "{value:.2f} [{low:.2f}, {high:.2f}]"
COLUMNS = (  # title, group, figure, how it is written
    ("training R@1", "train", "recall_1", INTERVAL),
    ("cells R@1", "cell", "recall_1", INTERVAL),
    ("cells R@5", "cell", "recall_5", INTERVAL),
    ("cells style", "cell", "right_style", INTERVAL),
    ("cells KID x1000", "cell", "kid", "{value:.1f} [{low:.1f}, {high:.1f}]"),
    ("cells near copies", "cell", "near_copies", INTERVAL),
    ("concepts R@5", "test", "recall_5", INTERVAL),
)


def get_config(rows: int) -> Any:
    """configs/seed.py with the changes of the first `rows` rows; pictures are drawn afterwards."""
    config = seed.get_config()
    config.sample_every = 0
    for row in ROWS[:rows]:
        config.update_from_flattened_dict(dict(row.changes))
    return config


def count_steps(config: Any, folder: Path, minutes: float, probe_steps: int) -> int:
    """Steps that fit into the minutes, by the speed of a run of `probe_steps`."""
    probe = config.copy_and_resolve_references()
    every = max(probe_steps // 4, 1)
    probe.update({"steps": probe_steps, "log_every": every})
    probe.update({name: probe_steps for name in ("eval_every", "save_every")})
    probe.optimizer.warmup_steps = min(probe.optimizer.warmup_steps, probe_steps - 1)
    train(probe, folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    speed = statistics.median(speeds[1:])  # The first holds compilation.
    return max(int(60 * minutes * speed / config.batch_size), probe_steps)


def get_trained(k: int) -> int:
    """The row whose weights row k draws with: the last one up to it that changes the training."""
    while all(key.startswith("sampling.") for key in ROWS[k].changes):
        k -= 1
    return k


def train_row(k: int, out: Path, minutes: float, probe_steps: int) -> Path:
    """Trains a row, where that was not done; the folder of the run."""
    config, folder = get_config(k + 1), get_folder(out, k)
    encode(config)
    written = folder / "run" / "config.json"
    if written.exists():
        steps = json.loads(written.read_text())["steps"]
    else:
        steps = count_steps(config, folder / "probe", minutes, probe_steps)
    config.update({name: steps for name in ("steps", "eval_every", "save_every")})
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 10)
    train(config, folder / "run")
    return folder / "run"


def add_guide(k: int, out: Path, run: Path) -> None:
    """Trains the guide of row k and lays it into the run that it is to guide."""
    if (run / GUIDE).exists():
        return
    config, folder = get_config(k + 1), get_folder(out, k) / "guide"
    config.update_from_flattened_dict(dict(ROWS[k].guide))
    config.update({name: config.steps for name in ("eval_every", "save_every")})
    train(config, folder)
    export_model(load_model(folder), run / GUIDE)


def run_row(k: int, out: Path, minutes: float, probe_steps: int, **settings: Any) -> None:
    """Measures row k into its folder; `settings` are those of `evaluate`."""
    run = train_row(get_trained(k), out, minutes, probe_steps)
    sampling = get_config(k + 1).sampling.to_dict()
    if ROWS[k].guide:
        add_guide(k, out, run)
    else:
        sampling["guide"] = None  # The run may have that of a later row.
    quality = get_folder(out, k) / "quality"
    evaluate(quality, checkpoint_folder=run, sampling=sampling, **settings)


def format_table(out: Path) -> str:
    """The rows that are done, as a markdown table; brackets hold intervals at 95 %."""
    titles = ["change", "steps", "batch", *(title for title, *_ in COLUMNS)]
    lines = [titles, ["---"] * 3 + ["---:"] * len(COLUMNS)]
    for k, row in enumerate(ROWS):
        folder = get_folder(out, k)
        if not (folder / DONE).exists():
            continue
        run = get_folder(out, get_trained(k)) / "run"
        config = json.loads((run / "config.json").read_text())
        groups = json.loads((folder / DONE).read_text())["groups"]
        cells = [
            form.format(**groups[group]["drawn"][figure]) if group in groups else "-"
            for _, group, figure, form in COLUMNS
        ]
        lines.append([row.name, str(config["steps"]), str(config["batch_size"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def get_folder(out: Path, k: int) -> Path:
    """Where row k lies."""
    return out / f"{k:02d}-{ROWS[k].name.replace(' ', '-')}"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"flags must look like --minutes=3, got {argv[1:]}")
    f = flags.FLAGS
    if f.verbosity <= 0:
        logging.set_verbosity(logging.WARNING)  # Orbax tells each of its steps as "info".
    names = [row.name for row in ROWS]
    wanted = f.rows or names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise app.UsageError(f"rows must be some of {names}, got {unknown}")
    out = Path(f.out).expanduser()
    print(keep_compiled(), flush=True)
    for k, name in enumerate(names):
        if name not in wanted or (get_folder(out, k) / DONE).exists():
            continue
        settings = {"captions_per_group": f.captions_per_group, "batch_size": f.batch_size}
        run_row(k, out, f.minutes, f.probe_steps, **settings)
        (out / "table.md").write_text(format_table(out) + "\n")
    print(format_table(out))


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 3.0, "of training, for each row", lower_bound=0.01)
    flags.DEFINE_string("out", None, "folder of the rows", required=True)
    flags.DEFINE_list("rows", [], "names of rows, separated by commas; default: all")
    flags.DEFINE_integer("probe_steps", 400, "steps that tell the speed", lower_bound=2)
    flags.DEFINE_integer("captions_per_group", 80, "drawn of each group", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "pictures drawn at once", lower_bound=1)
    app.run(main)
