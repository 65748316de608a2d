"""The rest of a text-to-image pipeline computes in ONNX Runtime what it computes in torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.store.artifact import Artifact
from tests.models import stable_diffusion_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_folder(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def bundle(pipeline_folder: Path) -> Artifact:
    return export(pipeline_folder, pipeline_folder.parent / "onnx")


def run(bundle: Artifact, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        bundle.file(f"{part}/model.onnx"), providers=["CPUExecutionProvider"]
    )
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


def test_every_component_of_the_index_is_there(bundle: Artifact, pipeline_folder: Path) -> None:
    folders = {name.split("/")[0] for name in bundle.files if "/" in name}
    assert folders == {"unet", "text_encoder", "tokenizer", "scheduler", "vae_encoder", "vae_decoder"}
    graphs = [name for name in bundle.files if name.endswith(".onnx")]
    for graph in graphs:
        assert json.loads(bundle.file(graph).with_name("config.json").read_text())


def test_components_equal_torch(bundle: Artifact, pipeline_folder: Path) -> None:
    pipeline = open_model(pipeline_folder).pipeline()
    length = pipeline.text_encoder.config.max_position_embeddings
    ids = torch.arange(3 * length).view(3, length) % 7
    latents = torch.randn(3, pipeline.vae.config.latent_channels, 8, 8)
    images = torch.randn(3, pipeline.vae.config.in_channels, 32, 32)
    with torch.no_grad():
        text = pipeline.text_encoder(ids)
        decoded = pipeline.vae.decode(latents).sample
        moments = pipeline.vae.encode(images).latent_dist.parameters
    hidden, pooled = run(bundle, "text_encoder", input_ids=ids.numpy())
    np.testing.assert_allclose(hidden, text.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(pooled, text.pooler_output, atol=1e-4)
    (sample,) = run(bundle, "vae_decoder", latent_sample=latents.numpy())
    np.testing.assert_allclose(sample, decoded, atol=1e-4)
    (parameters,) = run(bundle, "vae_encoder", sample=images.numpy())
    np.testing.assert_allclose(parameters, moments, atol=1e-4)
