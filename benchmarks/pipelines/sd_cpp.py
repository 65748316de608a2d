"""stable-diffusion.cpp through its Python package: 8 and 4 bits a weight, in blocks, with float arithmetic.

It knows the networks of published models by their names and sizes: no U-Net of another width or depth opens in it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.pipelines import Case, Contender, Opened


def _open(case: Case, form: str) -> Opened:
    from stable_diffusion_cpp import StableDiffusion

    pipeline = StableDiffusion(model_path=case.model, wtype=form, n_threads=case.threads, rng_type="cpu")

    def image(prompt: str, seed: int, steps: int) -> Any:
        made = pipeline.generate_image(
            prompt=prompt,
            width=case.size,
            height=case.size,
            cfg_scale=case.guidance,
            sample_steps=steps,
            seed=seed,
            sample_method="ddim_trailing",
        )
        return made[0]

    return Opened(image)


def _of_published_size(case: Case) -> str | None:
    return None if case.shape == "sd15" else "it opens the U-Nets of published models alone"


CONTENDERS = [
    Contender(
        f"stable-diffusion.cpp {form.upper()}",
        partial(_open, form=form),
        quantized=True,
        environment="stable-diffusion-cpp",
        obstacle=_of_published_size,
    )
    for form in ("q8_0", "q4_0")
]
