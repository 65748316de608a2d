"""Decoders at W8A8: what is quantized, how near the images stay, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.engines import int8_decoder
from qdeploy.engines.build import build_engine
from qdeploy.engines.int8_decoder import latents_of, psnr, quantize_decoder
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.zoo import find_zoo_model
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.store.artifact import Bundle, CalibrationFolder
from qdeploy.system.errors import CheckFailed, InvalidInputError, UsageError
from tests.models.pipelines import stable_diffusion_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_folder(tmp_path_factory.mktemp("decoder") / "model", vae_channels=(8, 8))


@pytest.fixture(scope="module")
def bundle(model: Path) -> Bundle:
    return export(model, model.parent / "onnx")


@pytest.fixture(scope="module")
def calibration(model: Path) -> CalibrationFolder:
    return collect(model, model.parent / "set", steps=2, keep=2, samples=2, prompts=["a cat", "two dogs"])


def small_decoder(path: Path, layers: int) -> list[str]:
    """Convolutions with a nonlinearity in between, the last with three channels; names of the layers."""
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "latent_sample"
    names = [f"conv.{number}" for number in range(layers)]
    for number, name in enumerate(names):
        shape = (3 if number == layers - 1 else 4, 4, 3, 3)
        values = (random.standard_normal(shape) / 6).astype(np.float32)
        if number == 0:
            values[:, 0] *= 20  # its codes are coarse for the other channels
        weights.append(numpy_helper.from_array(values, f"{name}.weight"))
        nodes.append(
            helper.make_node("Conv", [value, f"{name}.weight"], [f"{name}.out"], name=name, pads=[1] * 4)
        )
        value = "sample" if number == layers - 1 else f"{name}.tanh"
        nodes.append(helper.make_node("Tanh", [f"{name}.out"], [value], name=f"{name}.tanh"))
    dynamic = ["batch", 4, "height", "width"]
    inputs = [helper.make_tensor_value_info("latent_sample", onnx.TensorProto.FLOAT, dynamic)]
    outputs = [
        helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return names


def test_codes_have_seven_bits_and_layers_in_float_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = small_decoder(tmp_path / "float.onnx", 6)
    latents = np.random.default_rng(1).standard_normal((4, 4, 8, 8), dtype=np.float32)
    latents[:, 0] /= 20
    monkeypatch.setattr(int8_decoder, "FLOOR_DB", 1.0)
    easy = quantize_decoder(tmp_path / "float.onnx", latents, tmp_path / "easy" / "model.onnx")
    monkeypatch.setattr(int8_decoder, "FLOOR_DB", easy.psnr_db + 1)
    found = quantize_decoder(tmp_path / "float.onnx", latents, tmp_path / "int8" / "model.onnx")
    assert (easy.layers, easy.images, easy.floats) == (6, 2, ())
    assert found.floats == (names[0],)
    assert found.psnr_db >= easy.psnr_db + 1
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        assert node.name in names
        if node.name in found.floats:
            assert stored[node.input[1]].dtype == np.float32
        else:
            codes = stored[made_by[node.input[1]].input[0]]
            assert codes.dtype == np.int8
            assert np.abs(codes.astype(int)).max() <= 64


def test_what_a_transposed_convolution_reads_has_no_zero_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO computes it in float otherwise."""
    small_decoder(tmp_path / "plain.onnx", 3)
    model = onnx.load(tmp_path / "plain.onnx")
    middle = next(node for node in model.graph.node if node.name == "conv.1")
    middle.op_type = "ConvTranspose"
    onnx.save(model, tmp_path / "float.onnx")
    latents = np.random.default_rng(1).standard_normal((4, 4, 8, 8), dtype=np.float32)
    monkeypatch.setattr(int8_decoder, "FLOOR_DB", 1.0)
    found = quantize_decoder(tmp_path / "float.onnx", latents, tmp_path / "int8" / "model.onnx")
    assert (found.layers, found.floats) == (3, ())
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            zero = stored[made_by[node.input[0]].input[2]]
            assert zero.dtype == (np.int8 if node.name == "conv.1" else np.uint8)
            assert node.name != "conv.1" or zero == 0
            assert np.abs(stored[made_by[node.input[1]].input[0]].astype(int)).max() <= 64


def test_a_decoder_that_does_not_come_near_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_decoder(tmp_path / "float.onnx", 4)
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 8), dtype=np.float32)
    monkeypatch.setattr(int8_decoder, "FLOOR_DB", 110.0)
    with pytest.raises(CheckFailed, match="half of its layers in float"):
        quantize_decoder(tmp_path / "float.onnx", latents, tmp_path / "int8" / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_pipeline_decodes_with_it(
    bundle: Bundle, calibration: CalibrationFolder, tmp_path: Path, backend: str
) -> None:
    chosen = {"vae": "w8a8", "text_encoder": "f32"}
    engine = build_engine(
        bundle, tmp_path / "engine", backend=backend, threads=1, components=chosen, calibration=calibration
    )
    told = json.loads(engine.file("vae_decoder/w8a8.json").read_text())
    assert told["psnr_db"] >= 40
    assert engine.made_from["calibration"] == calibration.sha256
    folder = bundle.file("vae_decoder/model.onnx").parent
    latents = torch.from_numpy(latents_of(CalibrationSet.open(calibration.path), folder))[1:]  # held out
    decoded = load_pipeline(engine).vae.decode(latents).sample
    with torch.no_grad():
        exact = open_model(Path(bundle.source or "")).pipeline().vae.decode(latents).sample
    assert psnr(decoded.numpy(), exact.numpy()) > 38
    assert not torch.equal(decoded, exact)


@pytest.mark.slow
def test_what_cannot_be_quantized_is_refused(
    bundle: Bundle, calibration: CalibrationFolder, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="needs --calibration"):
        build_engine(bundle, tmp_path / "a", backend="onnxruntime", components={"vae": "w8a8"})
    with pytest.raises(UsageError, match="only decoders"):
        build_engine(
            bundle,
            tmp_path / "b",
            backend="onnxruntime",
            components={"text_encoder": "w8a8"},
            calibration=calibration,
        )
    with pytest.raises(UsageError, match="nothing else is calibrated"):
        build_engine(bundle, tmp_path / "c", backend="onnxruntime", calibration=calibration)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_set_of_one_image_cannot_be_checked(bundle: Bundle, model: Path, tmp_path: Path) -> None:
    data = collect(model, tmp_path / "one", steps=1, keep=1, samples=1, prompts=["a cat"])
    with pytest.raises(InvalidInputError, match="one image"):
        build_engine(
            bundle, tmp_path / "engine", backend="onnxruntime", components={"vae": "w8a8"}, calibration=data
        )
    assert not (tmp_path / "engine").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["scenes", "digits-dit"])
def test_shipped_models_reach_forty_decibels(name: str, tmp_path: Path) -> None:
    found = find_zoo_model(name)
    assert found is not None
    prompts = {"prompts": ["a large red circle", "two blue squares"]} if name == "scenes" else {}
    data = collect(found, tmp_path / "set", steps=10, keep=2, samples=8, **prompts)
    engine = build_engine(
        export(found, tmp_path / "onnx"),
        tmp_path / "engine",
        backend="openvino",
        threads=1,
        components={"vae": "w8a8"},
        calibration=data,
    )
    told = json.loads(engine.file("vae_decoder/w8a8.json").read_text())
    assert told["psnr_db"] >= 40
    assert len(told["floats"]) <= told["layers"] // 4
