"""ModelOpt's ONNX int8, run on ONNX Runtime. It pins packages of its own, so that it lives in its own Python."""

from __future__ import annotations

import subprocess
from functools import partial

from safetensors.torch import save_file

from benchmarks.contenders import Case, Contender
from benchmarks.contenders.onnxruntime_int8 import load_onnx

GRAPH = "modelopt.onnx"
_SCRIPT = """
import sys
from modelopt.onnx.quantization import quantize
from safetensors.numpy import load_file
graph, rows, output = sys.argv[1:]
quantize(graph, quantize_mode="int8", calibration_data=load_file(rows), calibration_eps=["cpu"],
         output_path=output, high_precision_dtype="fp32")
"""


def _prepare(case: Case) -> str | None:
    if (case.folder / GRAPH).is_file():
        return None
    if case.modelopt is None:
        return "no Python with ModelOpt was named (--modelopt)"
    rows = case.folder / "modelopt-rows.safetensors"
    # it splits arrays along the first axis, which the scalar timestep does not have: one row serves
    save_file({name: x[0] if x.ndim == 0 else x for name, x in _one_row(case).items()}, rows)
    command = [case.modelopt, "-c", _SCRIPT, str(case.onnx), str(rows), str(case.folder / GRAPH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


def _one_row(case: Case) -> dict[str, object]:
    import torch

    middle = len(case.feeds()) // 2
    return {name: torch.from_numpy(x.copy()) for name, x in case.feeds()[middle].items()}


CONTENDERS = {
    "ModelOpt int8 on ONNX Runtime": Contender(
        "ModelOpt int8 on ONNX Runtime", partial(load_onnx, name=GRAPH), _prepare, (GRAPH,)
    )
}
