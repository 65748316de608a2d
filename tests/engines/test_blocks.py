"""Weights in blocks from one command to engines: no calibration set, few bytes, the simulated numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir
import pytest
import torch

from qdeploy.engines.build import build_engine, load_engine
from qdeploy.evaluate.effective_bits import effective_bits
from qdeploy.export.run import export
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.store.artifact import Artifact
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.workflows.calibrate import calibrate
from tests.models import ddpm_folder

BACKENDS = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """A checkpoint and a bundle of a U-Net, in blocks where they fit."""
    folder = tmp_path_factory.mktemp("blocks")
    model = ddpm_folder(folder / "model", channels=(32, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDEPLOY_CACHE", str(folder / "cache"))
        checkpoint = calibrate(model, folder / "checkpoint", recipe="w4-blocks")
    assert isinstance(checkpoint, Artifact)
    return checkpoint, export(checkpoint, folder / "onnx")


@pytest.mark.slow
def test_no_calibration_set_is_needed_or_made(blocks: tuple[Artifact, Artifact]) -> None:
    assert not (blocks[0].path.parent / "cache" / "calibration").exists()
    assert set(blocks[0].made_from) == {"model"}


@pytest.mark.slow
def test_what_blocks_do_not_fit_has_eight_bit_weights_and_float_inputs(
    blocks: tuple[Artifact, Artifact],
) -> None:
    kinds: dict[tuple[str, str], set[str]] = {}
    for layer in quantized_layers(load_checkpoint(blocks[0])).values():
        names = tuple(each.name if each else "none" for each in layer.formats)
        kinds.setdefault(names, set()).add(type(layer.inner).__name__)  # type: ignore[arg-type]
    assert set(kinds) == {("int4b64", "int8-dynamic"), ("int8", "none")}
    assert kinds["int8", "none"] == {"Conv2d"}
    assert kinds["int4b64", "int8-dynamic"] == {"Conv2d", "Linear"}
    assert blocks[1].facts.dynamic_group == 32  # of the narrowest layer: OpenVINO has one for all
    bits = effective_bits(blocks[0])
    assert bits is not None
    assert 4 < bits["weights"] < 32


def test_group_sizes_are_one_for_openvino_and_each_layers_own_for_onnx_runtime(tmp_path: Path) -> None:
    model = ddpm_folder(tmp_path / "model", channels=(32, 64))
    groups = {}
    for target in BACKENDS:
        made = calibrate(model, tmp_path / target, recipe="w4-blocks", target=target)
        assert isinstance(made, Artifact)
        layers = quantized_layers(load_checkpoint(made)).values()
        groups[target] = {layer.dynamic.group for layer in layers if layer.dynamic is not None}
        assert groups[target] == ({32} if target == "openvino" else {32, 64})


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_computes_what_was_simulated(
    blocks: tuple[Artifact, Artifact], backend: str, tmp_path: Path
) -> None:
    engine = build_engine(blocks[1], tmp_path / "engine", backend=backend, threads=1)
    assert engine.measured.parity.sqnr_db >= 40
    network = load_checkpoint(blocks[0])
    inputs, reference, simulated = read_probe(engine.path)
    assert simulated is not None
    with load_engine(engine) as loaded, torch.no_grad():
        row = {name: x[:1] for name, x in inputs.items()}
        assert sqnr_by_row(loaded(row), denoise(network, row))[0] >= 40
    assert 15 < median(sqnr_by_row(simulated, reference)) < 45


def test_products_in_blocks_run_on_weights_of_four_bits(
    blocks: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    """OpenVINO's fully connected kernels read i4; nothing is unpacked to floats when the graph is compiled."""
    import openvino

    engine = build_engine(blocks[1], tmp_path / "engine", backend="openvino", threads=1)
    wanted = [
        layer for layer in quantized_layers(load_checkpoint(blocks[0])).values() if layer.dynamic is not None
    ]
    core = openvino.Core()
    model = core.read_model(engine.path / "unet" / "openvino_model.xml")
    model.reshape(
        {
            port.any_name: {4: [1, 3, 8, 8], 1: [1], 0: []}[port.partial_shape.rank.get_length()]
            for port in model.inputs
        }
    )
    executed = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    types = [str(op.get_rt_info()["layerType"].astype(str)) for op in executed.get_ordered_ops()]
    products = [
        op
        for op, kind in zip(executed.get_ordered_ops(), types, strict=True)
        if kind == "FullyConnected"
        and "i4" in {str(i.get_element_type().get_type_name()) for i in op.inputs()}
    ]
    assert len(products) == sum(len(layer.weight_quantizers) for layer in wanted)


def test_codes_of_four_bits_are_stored_in_four_bits(blocks: tuple[Artifact, Artifact]) -> None:
    graph = ir.load(blocks[1].path / "unet" / "model.onnx").graph
    layers: dict[str, QuantizedLayer] = quantized_layers(load_checkpoint(blocks[0]))
    stored: dict[str, Any] = {name: value.dtype for name, value in graph.initializers.items()}
    for path, layer in layers.items():
        codes = [
            dtype for name, dtype in stored.items() if name.startswith(f"{path}.weight.") and "codes" in name
        ]
        assert codes, path
        assert set(codes) == {ir.DataType.INT4 if layer.dynamic is not None else ir.DataType.INT8}


def test_weights_of_eight_bits_are_close_to_full_precision(tmp_path: Path) -> None:
    model = ddpm_folder(tmp_path / "model", channels=(32, 64))
    made = calibrate(model, tmp_path / "checkpoint", recipe="w8-weights")
    assert isinstance(made, Artifact)
    _, reference, simulated = read_probe(made.path)
    assert simulated is not None
    assert median(sqnr_by_row(simulated, reference)) > 38
