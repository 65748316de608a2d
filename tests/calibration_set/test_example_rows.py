"""Rows of noise fit the networks that they are drawn for, or the refusal says what to pass instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qdeploy.calibration_set.example_rows import ROWS, ExampleRows
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.system.errors import InvalidInputError


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt transformer whose captions are wider than its hidden states."""
    from diffusers import PixArtTransformer2DModel

    folder = tmp_path_factory.mktemp("pixart") / "transformer"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            caption_channels=24,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
    network.save_pretrained(folder)
    return folder


def test_captions_have_the_width_that_the_network_projects_from(captioned: Path) -> None:
    model = open_model(captioned)
    rows, denoiser = ExampleRows(model), model.load()
    rows.check_fits(model, denoiser)
    assert len(rows) == ROWS
    inputs = rows.inputs([0, 3])
    assert inputs["encoder_hidden_states"].shape[-1] == 24
    assert denoise(denoiser, inputs).shape[0] == 2
    assert torch.equal(rows.timesteps[[0, 3]], inputs["timestep"])


def test_the_same_seed_draws_the_same_rows(captioned: Path) -> None:
    model = open_model(captioned)
    one, same, other = (ExampleRows(model, 3, seed).inputs(range(3)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["hidden_states"], other["hidden_states"])


def test_a_network_with_inputs_that_nothing_describes_is_refused_in_a_sentence(captioned: Path) -> None:
    class Odd(nn.Linear):
        def forward(self, hidden_states, timestep, pose, return_dict=True):  # type: ignore[no-untyped-def]
            return (hidden_states + pose,)

    model = open_model(captioned)
    with pytest.raises(InvalidInputError, match="cannot be drawn at random: pass a calibration set"):
        ExampleRows(model).check_fits(model, Odd(1, 1))
