"""Scales for groups of timesteps in a static graph: constants in Q/DQ, factors from the timestep outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.minmax import round_to_nearest
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.base import Engine
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.measure import int8_shares
from qdeploy.evaluate.parity import open_subject
from qdeploy.export.graph import WEIGHTED_OPS, constant, producer, save
from qdeploy.export.lower import lower
from qdeploy.export.run import export
from qdeploy.export.trace import trace
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.insert import share_current_timestep
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.recipe.formats import int8
from qdeploy.store.artifact import Artifact
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import minmax_layer

pytestmark = pytest.mark.slow

GROUPS = 3


@pytest.fixture(scope="module")
def data(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    collect(ddpm, folder, samples=6, keep=6, steps=6, scheduler="ddim")
    return folder


def calibrated(ddpm: Path, data: Path, folder: Path, **recipe: Any) -> Artifact:
    made = calibrate(ddpm, folder, calibration=data, method="minmax", weights="int4", **recipe)
    assert isinstance(made, Artifact)
    return made


@pytest.fixture(scope="module")
def checkpoint(ddpm: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return calibrated(ddpm, data, tmp_path_factory.mktemp("bank") / "checkpoint", timestep_groups=GROUPS)


@pytest.fixture(scope="module")
def bundle(checkpoint: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "onnx")


@pytest.fixture(scope="module")
def graph(bundle: Artifact) -> ir.Model:
    return ir.load(bundle.file("unet/model.onnx"))


@pytest.fixture(scope="module")
def layers(checkpoint: Artifact) -> dict[str, QuantizedLayer]:
    return quantized_layers(load_checkpoint(checkpoint))


def products(graph: ir.Model, layers: dict[str, QuantizedLayer]) -> Iterator[tuple[str, int, ir.Node]]:
    """Path, part and node of each quantized layer's products."""
    nodes = {node.name: node for node in graph.graph}
    for path, layer in layers.items():
        for part in range(len(layer.weight_quantizers)):
            yield path, part, nodes[f"{path}/{part}" if layer.split else path]


def made_by(value: ir.Value | None, kind: str) -> ir.Node:
    node = producer(value)
    assert node is not None
    assert node.op_type == kind
    return node


def quantizer(node: ir.Node) -> ir.Node:
    """The QuantizeLinear before a product."""
    return made_by(made_by(node.inputs[0], "DequantizeLinear").inputs[0], "QuantizeLinear")


# -- the graph ---------------------------------------------------------------------------------------------


def test_every_scale_is_a_positive_constant_and_every_zero_point_0(graph: ir.Model) -> None:
    """An engine takes no scale that is computed; of activations it is a scalar, of weights per channel."""
    kinds = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    for node in graph.graph:
        if node.op_type not in kinds:
            continue
        kinds[node.op_type] += 1
        scale, zero = node.inputs[1:3] if len(node.inputs) > 2 else (node.inputs[1], None)
        assert scale is not None
        assert scale.is_initializer()
        assert np.all(constant(scale) > 0)
        weight = constant(node.inputs[0]) is not None
        assert constant(scale).ndim == int(weight)
        assert zero is None or not constant(zero).any()
    assert kinds["QuantizeLinear"] > 0
    assert kinds["DequantizeLinear"] > kinds["QuantizeLinear"]


def test_the_nominal_scale_and_the_factors_are_those_of_the_bank(
    graph: ir.Model, layers: dict[str, QuantizedLayer]
) -> None:
    """x * (s0 / s[t]) before, y * (s[t] / s0) after: each from a bank of one entry per group."""
    for path, part, node in products(graph, layers):
        own = layers[path].activation_quantizers[part]
        assert own.scale.shape == (GROUPS,)
        nominal = own.scale.log().mean().exp()
        quantize = quantizer(node)
        assert float(constant(quantize.inputs[1])) == pytest.approx(float(nominal), rel=1e-6)
        before = bank_of(made_by(quantize.inputs[0], "Mul"))
        assert np.allclose(before, (nominal / own.scale).numpy(), rtol=1e-6)
        after = [use.node for use in node.outputs[0].uses()]
        assert [use.op_type for use in after] == ["Mul"]
        assert np.allclose(bank_of(after[0]), (own.scale / nominal).numpy(), rtol=1e-6)


def bank_of(factor: ir.Node) -> np.ndarray:
    """The entries that the factor of a Mul is gathered from."""
    for value in factor.inputs:
        node = producer(value)
        while node is not None and node.op_type in ("Reshape", "Unsqueeze"):
            node = producer(node.inputs[0])
        if node is not None and node.op_type == "Gather":
            values = constant(node.inputs[0])
            if values is None:
                reshape = made_by(node.inputs[0], "Reshape")
                values = constant(reshape.inputs[0])
            return np.asarray(values).reshape(-1)
    raise AssertionError(f"{factor.name} multiplies by no bank")


def test_the_bias_is_added_after_the_factor(graph: ir.Model, layers: dict[str, QuantizedLayer]) -> None:
    """The factor belongs to the product alone: a bias inside would be scaled with the timestep."""
    for path, part, node in products(graph, layers):
        assert len([value for value in node.inputs if value is not None]) == 2, path
        (factor,) = (use.node for use in node.outputs[0].uses())
        users = [use.node for use in factor.outputs[0].uses()]
        if layers[path].bias is not None and part == 0:
            assert "Add" in {user.op_type for user in users}


def test_the_two_halves_of_a_split_shortcut_have_factors_of_their_own(
    graph: ir.Model, layers: dict[str, QuantizedLayer]
) -> None:
    splits = [path for path, layer in layers.items() if layer.split]
    assert splits
    nodes = {node.name: node for node in graph.graph}
    for path in splits:
        halves = [nodes[f"{path}/{part}"] for part in (0, 1)]
        banks = [bank_of(next(iter(half.outputs[0].uses())).node) for half in halves]
        assert not np.array_equal(*banks)
        assert quantizer(halves[0]) is not quantizer(halves[1])


def test_tied_projections_share_one_factor_and_one_quantizer(
    graph: ir.Model, layers: dict[str, QuantizedLayer]
) -> None:
    nodes = {node.name: node for node in graph.graph}
    attentions = sorted({path.removesuffix(".to_q") for path in layers if path.endswith(".to_q")})
    assert attentions
    for path in attentions:
        read = [quantizer(nodes[f"{path}.to_{name}"]) for name in "qkv"]
        assert read[0] is read[1] is read[2]
        assert made_by(read[0].inputs[0], "Mul")


def test_all_banks_of_a_graph_are_looked_up_once(graph: ir.Model) -> None:
    assert [node.op_type for node in graph.graph].count("Greater") == 1


class Small(nn.Module):
    """A convolution and a linear layer, with the timestep between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(3, 4, 3, padding=1)
        self.linear: nn.Module = nn.Linear(4, 3)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        h = self.conv(sample) + timestep.float().reshape(-1, 1, 1, 1) / 1000
        return (self.linear(h.movedim(1, -1)).movedim(-1, 1),)


def file_of(groups: int | None, path: Path) -> bytes:
    """The graph of a network whose quantizers have so many groups, or were never given any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small().requires_grad_(False)
    inputs = {"sample": torch.ones(2, 3, 6, 6), "timestep": torch.tensor(3)}
    for name, x in (("conv", torch.ones(1, 3, 6, 6)), ("linear", torch.ones(1, 6, 4))):
        layer = minmax_layer(getattr(network, name), x, int8, int8)
        round_to_nearest(layer)
        if groups is not None:
            (quantizer,) = layer.activation_quantizers
            edges = torch.arange(1.0, groups)
            quantizer.set(quantizer.scale.expand(groups), quantizer.zero_point.expand(groups), edges)
        setattr(network, name, layer)
    share_current_timestep(network)
    freeze(network)
    save(lower(trace(network, inputs), "portable"), path)
    return path.read_bytes()


def test_one_group_makes_the_very_same_file_as_none(tmp_path: Path) -> None:
    plain, one, two = (file_of(groups, tmp_path / f"{groups}.onnx") for groups in (None, 1, 2))
    assert plain == one
    assert b"Greater" not in one
    assert b"Greater" in two


# -- engines -----------------------------------------------------------------------------------------------


def rows_of(checkpoint: Artifact, each: int = 9) -> dict[str, Tensor]:
    """Some rows at every calibrated timestep."""
    timesteps = torch.tensor(checkpoint.facts.timesteps.calibrated).repeat_interleave(each)
    sample = torch.randn(len(timesteps), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"sample": sample, "timestep": timesteps}


def test_onnx_runtime_computes_what_torch_simulates_at_every_calibrated_timestep(
    checkpoint: Artifact, bundle: Artifact
) -> None:
    """The median over rows: a value on the edge between two codes may fall either way, once in a while."""
    inputs = rows_of(checkpoint)
    simulated, computed = open_subject(checkpoint).predict(inputs), open_subject(bundle).predict(inputs)
    for timestep in inputs["timestep"].unique():
        chosen = inputs["timestep"] == timestep
        rows = torch.tensor(sqnr_by_row(computed[chosen], simulated[chosen]))
        assert rows.median() >= 45, float(timestep)


def test_each_group_of_timesteps_matters(checkpoint: Artifact, bundle: Artifact) -> None:
    """The test above can fail: with another group's scales, the simulation is another function."""
    inputs, denoiser = rows_of(checkpoint), load_checkpoint(checkpoint)
    computed = open_subject(bundle).predict(inputs)
    for layer in quantized_layers(denoiser).values():
        for quantizer in layer.activation_quantizers:
            quantizer.scale = quantizer.scale.flip(0)
    with torch.no_grad():
        wrong = denoise(denoiser, inputs)
    assert torch.tensor(sqnr_by_row(computed, wrong)).median() < 45


@pytest.fixture(scope="module")
def engine(bundle: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = build_engine(bundle, tmp_path_factory.mktemp("engine") / "openvino", backend="openvino", threads=1)
    with load_engine(made) as opened:
        yield opened


@pytest.mark.parametrize("batch", [1, 3])
def test_openvino_runs_hoisted_layers_as_int8_kernels(
    engine: Engine, layers: dict[str, QuantizedLayer], batch: int
) -> None:
    """The factors must not keep the product from its int8 kernel, at any batch size."""
    inputs = {"sample": torch.randn(batch, 3, 8, 8), "timestep": torch.tensor(500.0)}
    assert int8_shares(engine, inputs)["int8_mac_share_of_meant"] == 1.0
    kernels = {name: kernel for kernel in engine.kernels(inputs) for name in kernel.layers}
    convolutions = [path for path, layer in layers.items() if layer.weight_quantizers[0].scale.ndim == 1]
    for path in convolutions:
        for name in [f"{path}/0", f"{path}/1"] if layers[path].split else [path]:
            assert kernels[name].precision == "int8", name


def test_openvino_computes_the_same_function(checkpoint: Artifact, engine: Engine) -> None:
    inputs = rows_of(checkpoint)
    simulated = open_subject(checkpoint).predict(inputs)
    rows = torch.tensor(sqnr_by_row(engine(inputs), simulated))
    assert rows.median() >= 35


def test_openvino_runs_groups_around_one_zero_point_as_int8_kernels(
    ddpm: Path, data: Path, tmp_path: Path
) -> None:
    recipe = {"activations": "uint8", "target": "openvino", "timestep_groups": GROUPS}
    checkpoint = calibrated(ddpm, data, tmp_path / "checkpoint", **recipe)
    bundle = export(checkpoint, tmp_path / "onnx")
    zero_points = [
        int(constant(node.inputs[2]))
        for node in ir.load(bundle.file("unet/model.onnx")).graph
        if node.op_type == "QuantizeLinear"
    ]
    assert len(set(zero_points)) > 1  # of SiLU's outputs, and of others
    made = build_engine(bundle, tmp_path / "openvino", backend="openvino", threads=1)
    inputs = rows_of(checkpoint)
    with load_engine(made) as opened:
        rows = torch.tensor(sqnr_by_row(opened(inputs), open_subject(checkpoint).predict(inputs)))
        first = {name: value[:1] for name, value in inputs.items()}
        assert (
            int8_shares(opened, first | {"timestep": torch.tensor(500.0)})["int8_mac_share_of_meant"] == 1.0
        )
    assert rows.median() >= 35


def test_the_graph_passes_the_checker_and_weighted_layers_are_all_there(
    bundle: Artifact, layers: dict[str, QuantizedLayer]
) -> None:
    path = bundle.file("unet/model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    named = {
        (node.name or "").partition("/")[0] for node in ir.load(path).graph if node.op_type in WEIGHTED_OPS
    }
    assert set(layers) <= named
