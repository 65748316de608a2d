"""A denoiser is loaded without a second copy of its weights, and is the one that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise, example_inputs
from qdeploy.system.errors import InvalidInputError
from tests.helpers import tiny_unet
from tests.models import ddpm_folder, tiny_dit


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit], ids=["unet", "transformer"])
def test_a_loaded_network_is_the_one_that_was_saved(make, tmp_path: Path) -> None:
    network = make()
    network.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    loaded = model.load()
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    inputs = example_inputs(model, rows=2)
    with torch.no_grad():
        assert torch.equal(denoise(loaded, inputs), denoise(network, inputs))


def test_a_network_is_built_without_memory_for_its_parameters(tmp_path: Path) -> None:
    network = tiny_dit()
    network.save_pretrained(tmp_path)
    built = open_model(tmp_path).build()
    assert all(parameter.is_meta for parameter in built.parameters())
    buffers = dict(network.named_buffers())
    assert buffers  # positions, which no file of weights holds
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in built.named_buffers())
    assert not torch.nn.Linear(2, 2).weight.is_meta  # and nothing of it is left behind


def test_changing_a_loaded_network_leaves_its_file_alone(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    before = model.sha256
    with torch.no_grad():
        for parameter in model.load().parameters():
            parameter.zero_()
    assert open_model(tmp_path).sha256 == before


def test_a_folder_whose_denoiser_was_not_copied_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}'
    )
    with pytest.raises(
        InvalidInputError, match=r"names the component unet, and there is no unet/config\.json"
    ):
        open_model(tmp_path)


@pytest.mark.parametrize("steps", [2**31, 0, -1, 1.5, "1000", None, float("inf")])
def test_a_scheduler_of_impossible_length_is_refused_before_it_makes_its_tables(
    tmp_path: Path, steps: object
) -> None:
    folder = ddpm_folder(tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": steps}))
    with pytest.raises(InvalidInputError, match="num_train_timesteps is a whole number"):
        open_model(folder).pipeline()
    with pytest.raises(InvalidInputError, match="num_train_timesteps is a whole number"):
        open_model(folder).scheduler()
