"""A network is given every condition that it has, and as many rows at once as its size allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from qdeploy.model import inputs
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise, denoise_rows, example_inputs, rows_at_once


class Network(nn.Module):
    """Keeps in mind how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.rows.append(len(sample))
        assert len(sample) == len(timestep) == len(prompt)
        return (sample * timestep.view(-1, 1, 1, 1) + prompt.sum(1).view(-1, 1, 1, 1),)


@pytest.mark.parametrize(
    ("shape", "rows"), [((4, 64, 64), 4), ((4, 128, 128), 1), ((3, 256, 256), 1), ((3, 32, 32), 21)]
)
def test_large_samples_come_a_few_at_a_time(shape: tuple[int, ...], rows: int) -> None:
    assert rows_at_once(torch.empty(50, *shape)) == rows


def test_parts_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample alone decides, whatever the order of the inputs."""
    monkeypatch.setattr(inputs, "NUMBERS_AT_ONCE", 2 * 12)
    given = {"prompt": torch.randn(5, 999), "sample": torch.randn(5, 3, 2, 2), "timestep": torch.arange(5.0)}
    network = Network()
    assert torch.equal(denoise_rows(network, given), denoise(network, given))
    assert network.rows == [2, 2, 1, 5]


BLOCKS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN: dict[str, Any] = {
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CONDITIONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "guidance as an embedding": (UNet2DConditionModel, TEXT | {"time_cond_proj_dim": 6}, "timestep_cond"),
    "a projected embedding": (
        UNet2DConditionModel,
        TEXT | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
        "class_labels",
    ),
    "few classes": (UNet2DModel, PLAIN | {"num_class_embeds": 3}, "class_labels"),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_denoiser_alone_is_given_every_condition_that_it_has(condition: str, tmp_path: Path) -> None:
    kind, options, name = CONDITIONS[condition]
    network = kind(**BLOCKS, **options).eval()
    network.save_pretrained(tmp_path)
    given = example_inputs(open_model(tmp_path), rows=5)
    other = given | {name: given[name].roll(1, 0)}
    with torch.no_grad():
        assert denoise(network, given).shape == given["sample"].shape
        assert not torch.equal(denoise(network, given), denoise(network, other))
