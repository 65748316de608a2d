"""Rotations and low-rank branches change nothing but what is quantized."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qdeploy.export.graph import constant, producer, save
from qdeploy.export.lower import lower
from qdeploy.export.trace import export_program
from qdeploy.quant.basis import hadamard, low_rank, rotate
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import freeze
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.recipe.formats import int4, int8
from tests.helpers import plain_options, sqnr_db

KINDS = {"linear": (nn.Linear, (2, 9, 64)), "convolution": (lambda i, o: nn.Conv2d(i, o, 1), (2, 64, 3, 5))}


def layer_with(
    kind: str, rotated: bool, branch: bool, smoothed: bool = True
) -> tuple[QuantizedLayer, Tensor]:
    make, shape = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        inner, x = make(64, 24).requires_grad_(False), torch.randn(shape)
        layer = QuantizedLayer(inner, int4, int8)
        if smoothed:
            layer.smoothing = torch.rand(64) + 0.5
        if branch:
            layer.branch_down, layer.branch_up = torch.randn(64, 4) / 8, torch.randn(4, 24) / 20
        if rotated:
            layer.rotation = hadamard(16)
    return layer, x


def calibrated(layer: QuantizedLayer, x: Tensor) -> None:
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, int4))
        quantizer.codes = quantizer.nearest(weight)
    (part,) = layer.input_parts(x)
    layer.activation_quantizers[0].set(*to_scale(part.min(), part.max(), int8))


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_a_hadamard_matrix_is_orthogonal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard(size).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


def test_an_outlier_is_spread_over_its_block_and_no_further() -> None:
    x = torch.zeros(1, 64)
    x[0, 20] = 8.0
    rotated = rotate(x, hadamard(16), -1)
    assert torch.allclose(rotated[0, 16:32].abs(), torch.full((16,), 2.0))
    assert not rotated[0, :16].any()
    assert not rotated[0, 32:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rotated", "branch"), [(True, False), (False, True), (True, True)])
def test_without_quantization_the_layer_computes_what_it_did(kind: str, rotated: bool, branch: bool) -> None:
    layer, x = layer_with(kind, rotated, branch)
    layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()
    assert sqnr_db(layer.inner(x), layer(x)) > 100


def test_the_branch_is_the_product_of_its_factors() -> None:
    x, down, up = torch.randn(3, 5, 16), torch.randn(16, 2), torch.randn(2, 7)
    assert sqnr_db(x @ (down @ up), low_rank(x, down, up, -1)) > 120


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_is_simulated_with_the_very_scales(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    layer, x = layer_with(kind, rotated=True, branch=True)
    calibrated(layer, x)
    simulated = layer(x)
    assert 12 < sqnr_db(layer.inner(x), simulated) < 60
    scales = layer.weight_quantizers[0].scale.clone(), layer.activation_quantizers[0].scale.clone()
    freeze(layer)
    graph = lower(export_program(layer, {"x": x}, ("y",)), "portable")
    save(graph, tmp_path / "layer.onnx")  # runs the checker
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", plain_options())
    assert sqnr_db(simulated, torch.from_numpy(session.run(None, {"x": x.numpy()})[0])) > 100
    weight, activation = _scales(ir.load(tmp_path / "layer.onnx"))
    assert torch.equal(weight.flatten(), scales[0])
    assert torch.equal(activation, scales[1])


def _scales(model: ir.Model) -> tuple[Tensor, Tensor]:
    """Of the quantized weight and of the quantized input."""
    for node in model.graph:
        operands = [producer(value) for value in node.inputs[:2]]
        kinds = [each.op_type if each is not None else "" for each in operands]
        if kinds == ["DequantizeLinear"] * 2:
            left, right = operands
            assert left is not None
            assert right is not None
            return torch.from_numpy(constant(right.inputs[1])), torch.from_numpy(constant(left.inputs[1]))
    raise AssertionError("no quantized product in the graph")


def test_layers_keep_their_names_beside_rotations_and_branches(tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, x = layer_with("linear", rotated=True, branch=True)
            self.k, _ = layer_with("linear", rotated=True, branch=True)
            for layer in (self.q, self.k):
                calibrated(layer, x)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x)], -1)

    network = Network()
    freeze(network)
    graph = lower(export_program(network, {"x": torch.randn(2, 9, 64)}, ("y",)), "portable")
    ir.save(graph, tmp_path / "network.onnx")
    onnx.checker.check_model(tmp_path / "network.onnx", full_check=True)
    names = [node.name for node in graph.graph]
    assert names.count("q") == names.count("k") == 1
    rotations = [
        node
        for node in graph.graph
        if node.op_type == "MatMul"
        and constant(node.inputs[1]) is not None
        and constant(node.inputs[1]).shape == (16, 16)
    ]
    assert len(rotations) == 1  # of the tensor that both read
