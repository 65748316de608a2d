from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.memory import activation_peak, estimate, warn_if_tight
from qdeploy.engines.tensorrt.options import Options
from qdeploy.engines.tensorrt.profiles import default_profile
from qdeploy.system.errors import InvalidInputError
from tests.engines.bundles import CHANNELS, SIZE, WIDTH, GraphBuilder, denoiser_graph
from tests.engines.tensorrt.bench import ADA


def test_a_graph_is_described(tmp_path: Path) -> None:
    onnx.save(denoiser_graph(True), tmp_path / "model.onnx")
    graph = read_graph(tmp_path / "model.onnx")
    assert [(port.name, port.dtype, port.dynamic) for port in graph.inputs] == [
        ("sample", "float32", True),
        ("timestep", "float32", False),
    ]
    assert graph.outputs[0].name == "out_sample"
    assert graph.low_bit == {"int8"}
    assert graph.opset == 21
    codes = WIDTH * WIDTH * 10
    assert codes < graph.weight_bytes < codes + 4 * (2 * CHANNELS * WIDTH * 9 + 200)


def test_asymmetric_codes_are_refused_with_the_node(tmp_path: Path) -> None:
    model = denoiser_graph(True)
    for tensor in model.graph.initializer:
        if tensor.name == "act_conv.zero":
            tensor.CopyFrom(numpy_helper.from_array(np.uint8(128), tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InvalidInputError, match=r"act_conv/q .* uint8.*target portable") as error:
        read_graph(tmp_path / "model.onnx")
    assert error.value.exit_code == 5


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InvalidInputError, match="no ONNX graph"):
        read_graph(tmp_path / "model.onnx")


def test_the_peak_counts_what_is_alive_at_once(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.add("Neg", ["sample"], "a")
    y = g.add("Neg", [x], "b")
    z = g.add("Neg", [y], "c")
    onnx.save(g.model({"sample": ["batch", 3, 6, 6]}, g.add("Add", [x, z], "sum")), tmp_path / "model.onnx")
    size = 5 * 3 * 6 * 6
    # a waits for the sum while b becomes c: three at once
    assert activation_peak(tmp_path / "model.onnx", {"sample": [5, 3, 6, 6]}, 2) == 3 * size * 2


def test_an_estimate_grows_with_the_batch_and_shrinks_with_the_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(denoiser_graph(False), path)
    graph = read_graph(path)

    def bytes_of(batch: int, precision: str) -> dict[str, int]:
        options = Options(batch=batch, precision=precision, workspace=1)
        return estimate(path, graph, [default_profile(graph.inputs, batch)], options)

    small, large, half = bytes_of(1, "f32"), bytes_of(4, "f32"), bytes_of(4, "f16")
    assert small["activations"] >= 2 * WIDTH * SIZE * SIZE * 4
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.01)
    assert (half["weights"], half["activations"]) == (large["weights"] // 2, large["activations"] // 2)
    assert small["workspace"] == 2**30
    warn_if_tight(small, ADA, Options())
    assert capsys.readouterr().err == ""
    warn_if_tight({"weights": 30 * 2**30}, ADA, Options())
    assert "may need 30.0 GiB (weights 30.0), the Fake Ada has 24.0" in capsys.readouterr().err
