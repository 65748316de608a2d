"""ModelOpt's ONNX int8, run on ONNX Runtime. It pins packages of its own, so that it lives in its own Python."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial

from safetensors.torch import save_file

from benchmarks.contenders import Case, Contender
from benchmarks.contenders.onnxruntime_int8 import load_onnx

GRAPH = "modelopt.onnx"
_SCRIPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization import CalibrationDataReader
from safetensors.numpy import load_file

class Reader(CalibrationDataReader):
    def __init__(self, rows):
        count = len(rows["timestep"])
        one = lambda name, x, i: np.array(x[i]) if name == "timestep" else x[i : i + 1]
        self.feeds = [{name: one(name, x, i) for name, x in rows.items()} for i in range(count)]
        self.rewind()
    def get_next(self):
        return next(self.left, None)
    def get_first(self):
        return self.feeds[0]
    def rewind(self):
        self.left = iter(self.feeds)

graph, rows, output = sys.argv[1:]
quantize(graph, quantize_mode="int8", calibration_data_reader=Reader(load_file(rows)), calibration_eps=["cpu"],
         output_path=output, high_precision_dtype="fp32")
"""


def _prepare(case: Case) -> str | None:
    if (case.folder / GRAPH).is_file():
        return None
    if case.modelopt is None:
        return "no Python with ModelOpt was named (--modelopt)"
    rows = case.folder / "modelopt-rows.safetensors"
    save_file({name: x.float() if name == "timestep" else x for name, x in case.rows().items()}, rows)
    graph = case.folder / "modelopt-input.onnx"
    shutil.copyfile(case.onnx, graph)  # it writes over the graph that it is given
    command = [case.modelopt, "-c", _SCRIPT, str(graph), str(rows), str(case.folder / GRAPH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


CONTENDERS = {
    "ModelOpt int8 on ONNX Runtime": Contender(
        "ModelOpt int8 on ONNX Runtime", partial(load_onnx, name=GRAPH), _prepare, (GRAPH,)
    )
}
