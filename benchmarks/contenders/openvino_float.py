"""OpenVINO on the full-precision graph, in f32 and bf16; and how any of its models is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import PRECISIONS, Case, Contender, Loaded

IR = "fp32.xml"


def compile_ir(ir: Path, inputs: Mapping[str, Tensor], precision: str, threads: int, count: bool) -> Any:
    """Compile an IR for the shapes of some inputs, with the same options for everybody."""
    import openvino

    core = openvino.Core()
    model = core.read_model(ir)
    model.reshape({port: list(inputs[port.any_name].shape) for port in model.inputs})
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERF_COUNT": count,
    }
    return core.compile_model(model, "CPU", options)


def load_ir(case: Case, name: str, precision: str) -> Loaded:
    """A model that is compiled when it is first called."""
    from openvino import Tensor as Shared

    ir, requests = case.folder / name, {}

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        key = tuple(tuple(x.shape) for x in inputs.values())
        if key not in requests:
            compiled = compile_ir(ir, inputs, precision, case.threads, False)
            requests[key] = compiled.create_infer_request()
        request = requests[key]
        for port, x in inputs.items():
            request.set_tensor(port, Shared(x.contiguous().numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return Loaded(call, ir, precision)


def _prepare(case: Case) -> None:
    import openvino

    if not (case.folder / IR).is_file():
        model = openvino.Core().read_model(case.onnx)
        openvino.save_model(model, case.folder / IR, compress_to_fp16=False)


CONTENDERS = {
    f"OpenVINO {name}": Contender(
        f"OpenVINO {name}",
        partial(load_ir, name=IR, precision=precision),
        _prepare,
        (IR, "fp32.bin"),
        floating=True,
        precision=precision,
    )
    for name, precision in zip(("fp32", "bf16"), PRECISIONS, strict=True)
}
