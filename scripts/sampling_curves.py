"""A checkpoint, real pictures => quality by network evaluations and by guidance, with plots.

    python -m scripts.sampling_curves --captions_per_group=64 --out=curves
    python -m scripts.sampling_curves --checkpoint=runs/mine --step=best --out=curves-mine

draws the same captions from the same noise with every setting, and writes into --out each point as
it comes (curves.json), tables (curves.md), evaluations.png and guidance.png. A command that was
broken off, or that asks for more, goes on where the file ends. docs/quality.md says more.
"""

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

import evaluate
from ldm_jax import models, plotting, quality, report, sampler, solvers
from ldm_jax.cache_files import digest_json
from ldm_jax.compiled import keep_compiled
from ldm_jax.digest import get_digests
from ldm_jax.schedules import get_noise_levels
from scripts.curve_points import get_key, load_points, save_points

GRID = "log_snr"  # For each method the levels nearest to the end of its walk, docs/sampling.md.
OWN_LEVELS = 70  # of the walk that fewer evaluations are held against
FAST, FAST_EVALUATIONS = "dpm_solver_pp_2m", 12  # which should be as good
PLOTTED = ("kid", "recall_1")

Curves = Mapping[str, Sequence[dict]]  # title => sampler settings, point by point


def count_evaluations(settings: Mapping[str, Any]) -> int:
    """How often these settings run the network, on text and no text together, for one picture."""
    levels = get_noise_levels(settings["diffusion_steps"], settings["schedule"])
    return solvers.count_evaluations(settings["method"], len(levels))


def complete(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler settings with the defaults of those that are not named, as JSON holds them."""
    parameters = inspect.signature(sampler.get_diffuser).parameters
    defaults = {k: p.default for k, p in parameters.items() if k not in ("denoiser", "guide")}
    return json.loads(json.dumps(defaults | dict(sampling)))


def plan_evaluations(
    sampling: Mapping[str, Any], samplers: Sequence[str], evaluations: Sequence[int]
) -> dict[str, list[dict]]:
    """Settings by sampler: the checkpoint's own at OWN_LEVELS, then each at most so often.

    Args:
        sampling: the checkpoint's settings; what is not varied stays as it is there.
        samplers: methods, or "method:schedule"; without a schedule it is GRID.
        evaluations: of the network.
    """
    own = complete(sampling) | {"diffusion_steps": OWN_LEVELS}
    curves = {f"the checkpoint's {own['method']}, {own['schedule']}": [own]}
    for name in samplers:
        method, _, schedule = name.partition(":")
        found = {}
        for number in sorted(evaluations):
            levels = solvers.count_levels(method, number)
            found[levels] = _get_walk(sampling, method, levels, schedule or GRID)
        curves[f"{method}, {schedule or GRID}"] = list(found.values())
    return curves


def plan_guidance(
    sampling: Mapping[str, Any],
    weights: Sequence[float],
    evaluations: int,
    interval: Sequence[float] = (),
) -> dict[str, list[dict]]:
    """Settings by guidance weight, at all noise levels and on an interval of them, by FAST."""
    if len(interval) not in (0, 2):
        raise ValueError(f"guidance_interval must be two levels or none, got {interval}")
    walk = _get_walk(sampling, FAST, solvers.count_levels(FAST, evaluations), GRID)
    curves = {}
    for low, high in [(0.0, 1.0), tuple(interval)] if interval else [(0.0, 1.0)]:
        title = f"at levels {low:g} to {high:g}" if (low, high) != (0, 1) else "at all levels"
        curves[title] = [
            # The weight 1 does nothing, on any interval.
            walk
            | {"class_guidance": weight, "style_guidance": 0.0}
            | {"guidance_interval": [0.0, 1.0] if weight == 1 else [low, high]}
            for weight in sorted(weights)
        ]
    return curves


def _get_walk(sampling, method, levels, schedule):
    settings = {"method": method, "diffusion_steps": levels, "schedule": schedule, "eta": 0.0}
    return complete(sampling) | settings


def measure_points(
    examinee: evaluate.Examinee,
    curves: Sequence[Curves],
    groups: Sequence[str],
    path: Path,
    told: Mapping[str, Any],
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, dict]:
    """Draws and measures what the file lacks, and saves it point by point.

    Args:
        examinee: from `evaluate.load_examinee`.
        curves: the settings.
        groups: of captions.
        path: of the file.
        told: whose points they are, see `load_points`.
    """
    points = load_points(path, told)
    settings = [s for by_title in curves for by_point in by_title.values() for s in by_point]
    wanted = {get_key(group, s): (group, s) for s in settings for group in groups}
    missing = [key for key in wanted if key not in points]
    for i, key in enumerate(missing):
        (group, sampling), began = wanted[key], time.perf_counter()
        images = evaluate.draw_group(examinee, group, sampling, batch_size, progress=False)
        seconds = round(time.perf_counter() - began, 1)  # with compilation
        figures = report.to_json(quality.measure_pictures(examinee.exam, group, images))
        evaluations = count_evaluations(sampling)
        points[key] = dict(
            group=group,
            evaluations=evaluations,
            seconds=seconds,
            sampling=sampling,
            figures=figures,
        )
        save_points(path, told, points)
        if progress:
            print(
                f"{i + 1}/{len(missing)} {group}: {sampling['method']}, {sampling['schedule']}, "
                f"{evaluations} evaluations, guidance {sampling['class_guidance']:g} at levels "
                f"{sampling['guidance_interval']}: KID x1000 {figures['kid']['value']:.1f}, R@1 "
                f"{figures['recall_1']['value']:.2f}; {seconds:.0f} s",
                flush=True,
            )
    return points


def write_curves(
    out: Path,
    points: Mapping[str, dict],
    by_evaluations: Curves,
    by_guidance: Curves,
    groups: Sequence[str],
    told: Mapping[str, Any],
) -> str:
    """Writes curves.md, evaluations.png and guidance.png; returns the text of the first."""
    lines = [f"{key}: {value}" for key, value in told.items()]
    text = ["# Quality by sampler settings", "; ".join(lines) + ". Brackets: 95 %."]
    if any(by_evaluations.values()):
        text += ["## By network evaluations", _tabulate(points, by_evaluations, groups)]
        text += [judge(points, by_evaluations, group) for group in groups]
        panels = _get_panels(points, by_evaluations, groups, count_evaluations)
        figure = plotting.plot_curves(panels, "network evaluations", log=True)
        figure.savefig(out / "evaluations.png", dpi=120)
    if any(by_guidance.values()):
        text += ["## By guidance weight", _tabulate(points, by_guidance, groups)]
        panels = _get_panels(points, by_guidance, groups, lambda s: s["class_guidance"])
        figure = plotting.plot_curves(panels, "guidance weight")
        figure.savefig(out / "guidance.png", dpi=120)
    written = "\n\n".join(text) + "\n"
    (out / "curves.md").write_text(written)
    return written


def judge(points: Mapping[str, dict], by_evaluations: Curves, group: str) -> str:
    """Whether FAST with few evaluations is within the interval of OWN_LEVELS, in one line.

    It is if neither figure is worse than the worse end of its interval.
    """
    (own,), *_ = by_evaluations.values()
    title = f"{quality.GROUPS[group].partition(':')[0]}: DPM-Solver++(2M) at {FAST_EVALUATIONS}"
    levels = solvers.count_levels(FAST, FAST_EVALUATIONS)
    fast = points.get(get_key(group, _get_walk(own, FAST, levels, GRID)))
    if fast is None:
        return f"{title} network evaluations was not measured."
    before, now = (report.from_json(p["figures"]) for p in (points[get_key(group, own)], fast))
    kid, recall = before["kid"], before["recall_1"]
    holds = now["kid"].value <= kid.high and now["recall_1"].value >= recall.low
    return (
        f"{title} network evaluations within the interval of {OWN_LEVELS} levels of {own['method']}"
        f", {own['schedule']}, or better: {'holds' if holds else 'does not hold'} (KID x1000 "
        f"{now['kid'].value:.1f} to [{kid.low:.1f}, {kid.high:.1f}], R@1 "
        f"{now['recall_1'].value:.2f} to [{recall.low:.2f}, {recall.high:.2f}])."
    )


def _tabulate(points, curves, groups):
    def name(title, s):
        return f"{title}, {count_evaluations(s)} evaluations, guidance {s['class_guidance']:g}"

    rows = {
        group: {
            name(title, s): report.from_json(points[get_key(group, s)]["figures"])
            for title, by_point in curves.items()
            for s in by_point
        }
        for group in groups
    }
    return report.format_table(rows)


def _get_panels(points, curves, groups, get_x):
    """For `plot_curves`: of each group a panel for each figure of PLOTTED."""
    panels = {}
    for group in groups:
        for key in PLOTTED:
            title = f"{report.FIGURES[key][0]}, {quality.GROUPS[group].partition(':')[0].lower()}"
            panels[title] = {
                name: [
                    (get_x(s), *points[get_key(group, s)]["figures"][key].values())
                    for s in by_point
                ]
                for name, by_point in curves.items()
            }
    return panels


def sampling_curves(
    out: str | Path,
    *,
    checkpoint_folder: str | Path | None = None,
    checkpoint_step: str | int = "last",
    ema: float | None = None,
    pictures: str | Path | None = None,
    captions_per_group: int = 64,
    seed: int = 0,
    groups: Sequence[str] = ("cell",),
    samplers: Sequence[str] = solvers.METHODS,
    evaluations: Sequence[int] = (6, 12, 24, 48, 69),
    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    guidance_evaluations: int = 24,
    guidance_interval: Sequence[float] = (0.1, 0.8),
    vae: str | None = None,
    text_encoder: str | None = None,
    features: str = "efflite0",
    batch_size: int = 16,
    progress: bool = True,
) -> str:
    """Measures the points that `out` lacks, and writes tables and plots of all that is asked for.

    The model, the encoders and what is drawn are named as for `evaluate.evaluate`.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: for settings or groups that do not exist, or a file of another exam.
        OSError: if the checkpoint, a picture or the weights of the features are missing.
    """
    model = models.load_model(checkpoint_folder, checkpoint_step, ema)
    sampling = model.meta["sampling"]
    by_evaluations = plan_evaluations(sampling, samplers, evaluations) if evaluations else {}
    by_guidance = plan_guidance(sampling, guidance, guidance_evaluations, guidance_interval)
    curves = by_evaluations, by_guidance
    for settings in (s for c in curves for by_point in c.values() for s in by_point):
        model.get_diffuser(**settings)  # Raises before the long part.
    examinee = evaluate.load_examinee(
        model,
        checkpoint_folder,
        pictures,
        captions_per_group,
        seed,
        vae=vae,
        text_encoder=text_encoder,
        features=features,
        progress=progress,
    )
    known = list(examinee.exam.chosen)
    if not groups or not {*groups} <= {*known}:
        raise ValueError(f"groups must be among {known}, got {list(groups)}")
    told = {
        "checkpoint": str(checkpoint_folder or "bundled"),
        "step": checkpoint_step if model.step is None else model.step,
        **({} if ema is None else {"ema": ema}),
        "weights": _get_digest(model),
        "captions": digest_json({k: examinee.exam.captions(k) for k in known}),
        **examinee.told,
    }
    out = Path(out).expanduser()
    points = measure_points(
        examinee, curves, groups, out / "curves.json", told, batch_size, progress
    )
    return write_curves(out, points, by_evaluations, by_guidance, groups, told)


def _get_digest(model):
    """Of all weights that pictures are drawn with."""
    own = get_digests(model.denoiser.variables)
    return digest_json([own, _get_digest(model.guide)] if model.guide else own)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"flags must look like --evaluations=6,12, got {argv[1:]}")
    f = flags.FLAGS
    if f.verbosity <= 0:
        logging.set_verbosity(logging.ERROR)  # Orbax tells each of its steps as "info".
    print(keep_compiled(), flush=True)
    try:
        text = sampling_curves(
            f.out,
            checkpoint_folder=f.checkpoint,
            checkpoint_step=f.step,
            ema=f.ema,
            pictures=f.pictures,
            captions_per_group=f.captions_per_group,
            seed=f.seed,
            groups=f.groups,
            samplers=f.samplers,
            evaluations=[int(n) for n in f.evaluations],
            guidance=[float(w) for w in f.guidance],
            guidance_evaluations=f.guidance_evaluations,
            guidance_interval=[float(level) for level in f.guidance_interval],
            vae=f.vae,
            text_encoder=f.text_encoder,
            features=f.features,
            batch_size=f.batch_size,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logging.debug("Raised here:", exc_info=True)  # Shown by --verbosity=1.
        raise SystemExit(f"sampling_curves.py: {error}") from error
    print(text)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "a run's workdir or an exported model")
    flags.DEFINE_string("step", "last", "a run's checkpoint: last, best (held-out loss), a number")
    flags.DEFINE_float("ema", None, "sigma_rel of an average made of the run's snapshots, as 0.08")
    flags.DEFINE_string("pictures", None, "folder of the real pictures; default: the run's own")
    flags.DEFINE_integer("captions_per_group", 64, "drawn of each group, at most", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "chooses the captions, and the noise of each", lower_bound=0)
    flags.DEFINE_list("groups", ["cell"], "of captions: train, cell, test")
    flags.DEFINE_list("samplers", list(solvers.METHODS), "methods, or method:schedule")
    flags.DEFINE_list("evaluations", ["6", "12", "24", "48", "69"], "of the network; none: empty")
    flags.DEFINE_list("guidance", ["1", "1.5", "2", "3", "4", "6"], "weights; none: empty")
    flags.DEFINE_integer("guidance_evaluations", 24, "for each weight", lower_bound=1)
    flags.DEFINE_list("guidance_interval", ["0.1", "0.8"], "drawn beside all levels; none: empty")
    flags.DEFINE_string("vae", None, "an autoencoder to decode by; default: the training's")
    flags.DEFINE_string("text_encoder", None, "where the training's lies now, as clip:FOLDER")
    flags.DEFINE_string("features", "efflite0", "efflite0, or inception:<weights file>")
    flags.DEFINE_integer("batch_size", 16, "pictures drawn at once", lower_bound=1)
    flags.DEFINE_string("out", "curves", "folder for curves.json, curves.md and two plots")
    app.run(main)
