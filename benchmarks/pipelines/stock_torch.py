"""The model as it is, in diffusers and torch: float32, bf16, and both of its large networks compiled."""

from __future__ import annotations

from functools import partial

from benchmarks.pipelines import Case, Contender, Opened, diffusers_like

FULL = "diffusers, torch float32"


def _open(case: Case, dtype: str, compiled: bool) -> Opened:
    import diffusers
    import torch

    torch.set_num_threads(case.threads)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        case.model, local_files_only=True, torch_dtype=getattr(torch, dtype), safety_checker=None
    )
    if compiled:
        pipeline.unet.forward = torch.compile(pipeline.unet.forward)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    return diffusers_like(pipeline, case)


def _needs_bf16(case: Case) -> str | None:
    return None if case.bf16 else "this processor has no bf16 instructions"


CONTENDERS = [
    Contender(FULL, partial(_open, dtype="float32", compiled=False)),
    Contender(f"{FULL}, compiled", partial(_open, dtype="float32", compiled=True)),
    *(
        Contender(
            f"diffusers, torch bf16{', compiled' if compiled else ''}",
            partial(_open, dtype="bfloat16", compiled=compiled),
            obstacle=_needs_bf16,
        )
        for compiled in (False, True)
    ),
]
