"""Whom `benchmarks/pipeline.py` lets compete from prompt to PNG: a family per file, with ``CONTENDERS`` by name.

Nothing here imports qdeploy or a heavy library: the same files run in the environment of the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

FAMILIES = ("qdeploy_engines", "stock_torch", "optimum_intel", "openvino_genai", "onnx_runtime", "sd_cpp")
TEXT, DENOISER, DECODER = "text encoder", "denoiser", "decoder"
PARTS = (TEXT, DENOISER, DECODER)


@dataclass(frozen=True)
class Case:
    """What all contenders are given.

    Attributes:
        shape: name of the model's shape.
        folder: where everything that is prepared lies.
        model: the diffusers folder.
        size: height and width of the images in pixels.
        guidance: classifier-free guidance scale.
        threads: of each runtime.
        prompts: image i is of prompt i, in turns.
        bf16: whether the processor computes in bf16; software bf16 is no contender.
        weights: qdeploy's format of weights: ``int7`` where sums of 8 bits saturate.
    """

    shape: str
    folder: str
    model: str
    size: int
    guidance: float
    threads: int
    prompts: tuple[str, ...]
    bf16: bool
    weights: str

    @property
    def precision(self) -> str:
        """What OpenVINO computes floats in."""
        return "bf16" if self.bf16 else "f32"

    def place(self, name: str) -> Path:
        """A folder of what is prepared."""
        return Path(self.folder) / name


@dataclass
class Opened:
    """A contender that is ready.

    Attributes:
        image: from prompt, seed and steps to a PIL image.
        parts: milliseconds in each of `PARTS` since they were last cleared; empty where it cannot be known.
    """

    image: Callable[[str, int, int], Any]
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One way from a prompt to a picture.

    Attributes:
        name: for the tables.
        open: loads what was prepared.
        folder: what it loads, below the case's folder; None for the model itself.
        prepare: writes that folder, unless it is there.
        environment: what it needs installed, a file of requirements beside this one; None for what qdeploy needs.
        quantized: whether anything is.
        after: a contender that must be prepared before.
        obstacle: why it cannot run for a case, if so.
    """

    name: str
    open: Callable[[Case], Opened]
    folder: str | None = None
    prepare: Callable[[Case], None] | None = None
    environment: str | None = None
    quantized: bool = False
    after: str | None = None
    obstacle: Callable[[Case], str | None] = lambda case: None


def contenders() -> dict[str, Contender]:
    """All contenders by name."""
    found: dict[str, Contender] = {}
    for family in FAMILIES:
        found.update({each.name: each for each in import_module(f"{__name__}.{family}").CONTENDERS})
    return found


def diffusers_like(pipeline: Any, case: Case) -> Opened:
    """A pipeline that is called as those of diffusers are, with its networks watched."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    opened = Opened(lambda prompt, seed, steps: image(prompt, seed, steps), dict.fromkeys(PARTS, 0.0))

    def image(prompt: str, seed: int, steps: int) -> Any:
        return pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=case.guidance,
            height=case.size,
            width=case.size,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]

    for owner, name, part in (
        (pipeline.text_encoder, "forward", TEXT),
        (pipeline.unet, "forward", DENOISER),
        (pipeline.vae, "decode", DECODER),
    ):
        setattr(owner, name, _watched(getattr(owner, name), part, opened.parts))
    return opened


def _watched(function: Callable[..., Any], part: str, parts: dict[str, float]) -> Callable[..., Any]:
    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] += (time.perf_counter() - began) * 1e3

    return watched
