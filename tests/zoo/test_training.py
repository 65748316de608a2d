"""The zoo's training loop: an interruption at any time changes nothing, and the average is what stays."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import pretend_processor
from tools.zoo import training
from tools.zoo.training import Draws, bf16_where_fast, fit, forget, rate_at


class Killed(Exception):
    """Stands in for the end of the process."""


@pytest.fixture(autouse=True)
def save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 4)


def train(folder: Path, kill_at: int | None = None, steps: int = 20, decay: float = 0.9) -> nn.Linear:
    torch.manual_seed(0)
    network = nn.Linear(3, 1)

    def loss_of(draws: Draws) -> Tensor:
        if draws.step == kill_at:
            raise Killed
        inputs = torch.randn(8, 3, generator=draws.torch)
        error = network(inputs) - inputs.sum(1, keepdim=True) + draws.numpy.normal() * 0.01
        loss: Tensor = error.square().mean()
        return loss

    folder.mkdir(exist_ok=True)
    fit(network, loss_of, name="line", folder=folder, steps=steps, rate=0.1, decay=decay)
    return network


@pytest.mark.parametrize("kill_at", [1, 4, 5, 11, 20])
def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path, kill_at: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "broken", kill_at)
    continued = train(tmp_path / "broken")
    assert torch.equal(whole.weight, continued.weight)
    assert torch.equal(whole.bias, continued.bias)


def test_a_snapshot_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "broken", 11)
    (tmp_path / "broken" / "line.partial").write_bytes(b"half a snap")
    assert torch.equal(whole.weight, train(tmp_path / "broken").weight)


def test_the_network_ends_with_the_average_of_its_weights(tmp_path: Path) -> None:
    last, mean = train(tmp_path / "last", decay=0.0), train(tmp_path / "mean", decay=0.99)
    assert not torch.equal(last.weight, mean.weight)
    state = torch.load(tmp_path / "mean" / "line.snapshot", weights_only=True)
    assert torch.equal(state["average"][0], mean.weight)
    assert torch.equal(state["network"]["weight"], last.weight)


def test_it_learns_and_logs_what_it_did(tmp_path: Path) -> None:
    network = train(tmp_path / "a", steps=200)
    assert network.weight.detach() == pytest.approx(1.0, abs=0.05)
    records = [json.loads(line) for line in (tmp_path / "a" / "training.log").read_text().splitlines()]
    assert [record["step"] for record in records] == [100, 200]
    assert records[1]["loss"] < records[0]["loss"]
    forget(tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.snapshot"))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [rate_at(step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[2:74] == [1.0] * 72
    assert all(a > b for a, b in pairwise(rates[75:]))
    assert rates[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize(("flags", "kind"), [("avx2", torch.float32), ("avx512_bf16", torch.bfloat16)])
def test_bf16_is_used_where_the_processor_has_it(
    flags: str, kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_processor(monkeypatch, tmp_path, flags)
    with bf16_where_fast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind
