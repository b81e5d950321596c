"""How far each sampler is from the end of its walk => a table of errors by network evaluations.

    python -m benchmarks.solver_steps [--evaluations=8,12,18,35,69] [--reference=300]

draws the latents of a few captions with the bundled weights, always from the same noise, and prints
for each method and schedule the root mean square distance, over latents in [-1, 1], from what
Heun's method draws with --reference levels. Guidance and thresholding are part of the estimate, so
that all methods walk along the same equation; the rule is the variance-preserving one.
"""

import jax
import numpy as np
from absl import app, flags

from ldm_jax import models, sampler, solvers
from ldm_jax.sampler import in_float32_on_cpu
from ldm_jax.text import load_text_encoder

CAPTIONS = ("red apple, Fluent 3D", "cat face, Twemoji", "grinning face, Noto", "taxi, Twemoji")
METHODS = ("ddim", "heun", "dpm_solver_pp_2m")
SCHEDULES = ("angle", "karras", "log_snr")


def main(argv):
    f = flags.FLAGS
    evaluations = [int(number) for number in f.evaluations]
    model = models.load_model()
    denoiser = in_float32_on_cpu(model.denoiser)
    captions = CAPTIONS[: f.captions]
    labels = load_text_encoder(model.meta["text_encoder"]["name"])(list(captions))
    noise = sampler.sample_seeds(range(len(captions)), tuple(model.meta["latent_shape"]))

    def draw(method, schedule, levels):
        diffuser = sampler.get_diffuser(
            denoiser,
            class_guidance=f.guidance,
            diffusion_steps=levels,
            mixture="variance_preserving",
            schedule=schedule,
            method=method,
        )
        return np.asarray(diffuser.reverse_diffusion(noise, labels))

    reference = draw("heun", "log_snr", f.reference)
    print("| method, schedule | " + " | ".join(map(str, evaluations)) + " |")
    print("|---|" + "---:|" * len(evaluations))
    for method in METHODS:
        for schedule in SCHEDULES:
            errors = []
            for number in evaluations:
                levels = solvers.count_levels(method, number)
                drawn = draw(method, schedule, levels)
                errors.append(float(np.sqrt(np.mean(np.square(drawn - reference)))))
            cells = " | ".join(f"{error:.3f}" for error in errors)
            print(f"| {method}, {schedule} | {cells} |", flush=True)
    print(
        f"\nRoot mean square of the reference: {np.sqrt(np.mean(np.square(reference))):.3f}; "
        f"{len(captions)} captions, guidance {f.guidance}, {jax.devices()[0].device_kind}."
    )


if __name__ == "__main__":
    flags.DEFINE_list("evaluations", ["8", "12", "18", "35", "69"], "of the network")
    flags.DEFINE_integer("reference", 300, "levels of the reference", lower_bound=3)
    flags.DEFINE_integer("captions", 4, "how many", lower_bound=1, upper_bound=len(CAPTIONS))
    flags.DEFINE_float("guidance", 3.0, "weight of the text")
    app.run(main)
