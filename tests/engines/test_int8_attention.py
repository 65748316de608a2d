"""Attention's products in int8, from recipe to kernel."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import qdeploy
from qdeploy.engines.build import load_engine
from qdeploy.engines.placement import place
from qdeploy.recipe.formats import int8, uint8
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.artifact import Artifact
from qdeploy.store.probe import read_probe
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import int8_sums_saturate
from tests.models import stable_diffusion_folder

COVERAGE = "portable-attention"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A text-to-image U-Net whose attention is quantized too."""
    folder = tmp_path_factory.mktemp("attention")
    model = stable_diffusion_folder(folder / "model", seed=1)  # with 0 a value lies between two codes
    data = qdeploy.collect(model, folder / "set", samples=2, keep=3, steps=3, prompts=["a cat", "a dog"])
    assert isinstance(data, Artifact)
    checkpoint = qdeploy.calibrate(
        model, folder / "checkpoint", activations="uint8", coverage=COVERAGE, calibration=data, effort="fast"
    )
    assert isinstance(checkpoint, Artifact)
    return qdeploy.export(checkpoint, folder / "onnx", components=False)


def test_operands_are_symmetric_where_an_engine_is_to_run_them() -> None:
    assert resolve_recipe(coverage=COVERAGE).target == "openvino"
    on_engines = resolve_recipe(coverage=COVERAGE, activations="uint8")
    assert on_engines.attention == int8
    assert on_engines.simulated() == []
    simulated = resolve_recipe(coverage="qdiffusion-paper", activations="uint8")
    assert simulated.attention == uint8
    assert "q, k, v" in simulated.simulated()[0]
    assert resolve_recipe(activations="uint8", target="openvino").attention is None


@pytest.mark.parametrize("target", ["portable", "tensorrt", "onnxruntime"])
def test_targets_without_such_a_kernel_refuse(target: str) -> None:
    with pytest.raises(UsageError, match="attention products: choose --target openvino"):
        resolve_recipe(coverage=COVERAGE, target=target)


def products(bundle: Artifact) -> set[str]:
    """Names of attention's products: both of their inputs are computed."""
    graph = onnx.load(bundle.file("unet/model.onnx")).graph
    stored = {tensor.name for tensor in graph.initializer}
    dequantized = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    moved = {
        node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in dequantized
    }
    found = (node for node in graph.node if node.op_type == "MatMul")
    return {node.name for node in found if node.input[1] not in stored | dequantized | moved}


@pytest.mark.skipif(
    int8_sums_saturate(), reason="x86 without VNNI computes 8-bit weights in float, or overflows"
)
def test_openvino_multiplies_them_in_int8(bundle: Artifact, tmp_path: Path) -> None:
    engine = qdeploy.build_engine(bundle, tmp_path / "engine", backend="openvino", threads=1)
    measured = engine.measured
    assert measured.int8_mac_share_of_meant == 1.0
    assert measured.parity.sqnr_db >= 45
    inputs, _, _ = read_probe(engine.path)
    with load_engine(engine) as loaded:
        kernels = [
            k for k in loaded.kernels({name: x[:1] for name, x in inputs.items()}) if k.kind == "Attention"
        ]
    named = products(bundle)
    assert named
    assert {layer for kernel in kernels for layer in kernel.layers if layer in named} == named
    assert {kernel.precision for kernel in kernels} == {"int8"}


@pytest.mark.skipif(
    int8_sums_saturate(), reason="x86 without VNNI computes 8-bit weights in float, or overflows"
)
def test_onnxruntime_computes_the_same(bundle: Artifact, tmp_path: Path) -> None:
    engine = qdeploy.build_engine(bundle, tmp_path / "engine", backend="onnxruntime", threads=1)
    assert engine.measured.parity.sqnr_db >= 45


@pytest.mark.slow
def test_placement_weighs_attention_like_every_other_product(
    bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_RACE_SECONDS", "_FAMILY_SECONDS"):
        monkeypatch.setattr(place, name, 0.05)
    engine = qdeploy.build_engine(
        bundle, tmp_path / "engine", threads=1, precision="f32", optimize_for="latency"
    )
    decisions = engine.measured.placement.decisions
    weighed = {product for decision in decisions for product in decision.products}
    assert products(bundle) <= weighed
