from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from qdeploy.engines.tensorrt.parity import compare, outcome, require
from qdeploy.system.errors import CapabilityError
from tests.engines.bundles import denoiser_graph, example_inputs


def test_without_a_gpu_or_polygraphy_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(CapabilityError, match="pip install polygraphy"):
        require()
    with pytest.raises(CapabilityError):
        compare(tmp_path / "model.onnx", tmp_path, {})


def test_two_runners_are_compared_by_the_median(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    graph = denoiser_graph(True)
    onnx.save(graph, tmp_path / "a.onnx")
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "b_conv")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, "b_conv"))
    onnx.save(graph, tmp_path / "b.onnx")
    inputs = {name: x.numpy() for name, x in example_inputs(2).items()}
    inputs["timestep"] = inputs["timestep"][0]

    def runner(name: str, label: str) -> OnnxrtRunner:
        return OnnxrtRunner(SessionFromOnnx(str(tmp_path / name)), name=label)

    same = outcome([runner("a.onnx", "one"), runner("a.onnx", "two")], inputs)
    assert same["out_sample"] == {"passed": True, "max_abs": 0, "mean_abs": 0, "median_abs": 0}
    other = outcome([runner("a.onnx", "one"), runner("b.onnx", "two")], inputs)
    assert not other["out_sample"]["passed"]
    assert other["out_sample"]["max_abs"] > 0.1
