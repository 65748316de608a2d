"""A network is given as many rows at once as its size allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdeploy.model import inputs
from qdeploy.model.inputs import denoise, denoise_rows, rows_at_once


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
