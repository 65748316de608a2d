"""Decoders at W8A8: what is quantized, how near the images stay, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.engines.int8_decoder import FLOOR_DB, psnr, quantize_decoder
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.zoo import find_zoo_model
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.store.artifact import Bundle, CalibrationFolder
from qdeploy.system.errors import InvalidInputError, UsageError
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


def test_codes_have_seven_bits_and_layers_in_float_are_as_they_were(bundle: Bundle, tmp_path: Path) -> None:
    graph = bundle.file("vae_decoder/model.onnx")
    latents = np.random.default_rng(0).standard_normal((4, 4, 8, 8), dtype=np.float32)
    found = quantize_decoder(graph, latents, tmp_path / "int8" / "model.onnx")
    assert found.psnr_db >= FLOOR_DB
    before, after = (onnx.load(path).graph for path in (graph, tmp_path / "int8" / "model.onnx"))
    layers = [node for node in after.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    made_by = {output: node for node in after.node for output in node.output}
    integer = [node for node in layers if made_by.get(node.input[1], node).op_type == "DequantizeLinear"]
    assert len(layers) == found.layers == len(integer) + len(found.floats)
    assert not {node.name for node in integer} & set(found.floats)
    stored = {each.name: numpy_helper.to_array(each) for each in after.initializer}
    for node in integer:
        codes = stored[made_by[node.input[1]].input[0]]
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max() <= 64
    assert {node.name for node in before.node} <= {node.name for node in after.node}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_pipeline_decodes_with_it(
    bundle: Bundle, calibration: CalibrationFolder, tmp_path: Path, backend: str
) -> None:
    chosen = {"vae": "w8a8", "text_encoder": "f32"}
    engine = build_engine(
        bundle, tmp_path / "engine", backend=backend, threads=1, components=chosen, calibration=calibration
    )
    told = json.loads(engine.file("vae_decoder/w8a8.json").read_text())
    assert told["psnr_db"] >= FLOOR_DB
    assert engine.made_from["calibration"] == calibration.sha256
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = load_pipeline(engine).vae.decode(latents).sample
    with torch.no_grad():
        exact = open_model(Path(bundle.source or "")).pipeline().vae.decode(latents).sample
    assert psnr(decoded.numpy(), exact.numpy()) > FLOOR_DB - 10  # the set's latents are others
    assert not torch.equal(decoded, exact)


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


def test_a_set_of_one_image_cannot_be_checked(bundle: Bundle, model: Path, tmp_path: Path) -> None:
    data = collect(model, tmp_path / "one", steps=1, keep=1, samples=1, prompts=["a cat"])
    with pytest.raises(InvalidInputError, match="one image"):
        build_engine(
            bundle, tmp_path / "engine", backend="onnxruntime", components={"vae": "w8a8"}, calibration=data
        )
    assert not (tmp_path / "engine").exists()


@pytest.mark.slow
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
