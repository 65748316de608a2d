"""Torch itself: eager in float32 and bfloat16, and compiled in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.contenders import Case, Contender, Loaded
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise


def _load(case: Case, dtype: torch.dtype, compiled: bool) -> Loaded:
    torch.set_num_threads(case.threads)
    network = open_model(case.model).load().to(dtype).eval()
    run = torch.compile(network) if compiled else network

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        rows = next(len(x) for name, x in inputs.items() if name != "timestep")
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        given["timestep"] = inputs["timestep"].expand(rows)
        with torch.inference_mode():
            return denoise(run, given).float()

    return Loaded(call)


CONTENDERS = {
    name: Contender(
        name,
        partial(_load, dtype=dtype, compiled=compiled),
        floating=True,
        precision="f32" if dtype == torch.float32 else "bf16",
    )
    for name, dtype, compiled in (
        ("torch fp32", torch.float32, False),
        ("torch bf16", torch.bfloat16, False),
        ("torch.compile bf16", torch.bfloat16, True),
    )
}
