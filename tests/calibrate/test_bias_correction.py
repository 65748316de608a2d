"""The mean error of a unit's output goes into a bias, and only where unseen rows agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.bias_correction import correct_bias
from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import FORMATS
from tests.helpers import MemoryRows, calibrating, layer_problem, tiny_unet

LEARN = 48


def problem_of(inner: nn.Module, x: Tensor, wrong: float = 0.0) -> tuple[UnitProblem, QuantizedLayer]:
    """A layer of four-bit weights; ``wrong`` is added to what is wanted of the rows that are judged by."""
    layer = QuantizedLayer(inner.requires_grad_(False), FORMATS["int4"], None).requires_grad_(False)
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, FORMATS["int4"]))
    wanted = inner(x).detach()
    wanted[LEARN:] += wrong
    return layer_problem(layer, x, wanted, learn=LEARN), layer


def made(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer and inputs whose mean is not 0, as behind SiLU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "convolution":
            return nn.Conv2d(6, 8, 3, padding=1), torch.randn(64, 6, 5, 5) + 2
        return nn.Linear(6, 8), torch.randn(64, 7, 6) + 2


@pytest.mark.parametrize("kind", ["convolution", "tokens"])
def test_no_channel_has_a_mean_error_any_more(kind: str) -> None:
    problem, layer = problem_of(*made(kind))
    weights = [weight.clone() for weight in layer.quantized_weights()]
    before = problem.judged(p=2)
    assert correct_bias(problem, [layer], batch=10)
    missing = problem.targets.tensors[0] - problem.run(torch.arange(64))
    channels = missing[:LEARN].movedim(layer.feature_axis, -1).flatten(0, -2)
    assert channels.mean(0).abs().max() < 1e-5
    assert channels.std(0).min() > 1e-3, "what is left differs from input to input"
    assert problem.judged(p=2) < before
    assert all(map(torch.equal, weights, layer.quantized_weights()))


def test_biases_stay_where_unseen_rows_disagree() -> None:
    problem, layer = problem_of(*made("tokens"))
    shift = (problem.targets.tensors[0] - problem.run(torch.arange(64)))[:LEARN].flatten(0, 1).mean(0)
    wrong, layer = problem_of(*made("tokens"), wrong=-10 * float(shift.abs().max()))
    wrong.targets.tensors[0][LEARN:] -= 10 * shift
    assert not correct_bias(wrong, [layer])
    assert layer.tuned_bias is None


def test_the_last_layer_of_as_many_channels_is_taken() -> None:
    problem, layer = problem_of(*made("convolution"))
    other, narrow, bare = (
        QuantizedLayer(nn.Conv2d(8, channels, 1, bias=bias), None, None)
        for channels, bias in ((8, True), (3, True), (8, False))
    )
    assert correct_bias(problem, [other, layer, narrow, bare])
    assert layer.tuned_bias is not None
    assert other.tuned_bias is narrow.tuned_bias is bare.tuned_bias is None
    assert not correct_bias(problem, [narrow, bare])


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with calibrating(tiny_unet(), MemoryRows.noisy(), tmp_path / "checkpoint", weights="int4") as session:
        minmax.WeightRanges().run(session)
        yield session


def test_later_units_are_rounded_behind_corrected_ones(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each unit's inputs, as it is learned, come from units whose biases are right already."""
    seen: list[int] = []
    original = UnitWalk.problem

    def spy(walk: UnitWalk, unit: str) -> UnitProblem:
        seen.append(sum(layer.tuned_bias is not None for layer in session.quantized(session.layers)))
        return original(walk, unit)

    monkeypatch.setattr(UnitWalk, "problem", spy)
    AdaRound(steps=2, bias=True).run(session)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] >= len(seen) // 2


def test_units_with_several_outputs_are_left_alone() -> None:
    problem, layer = problem_of(*made("tokens"))
    pair = SimpleNamespace(
        learn=problem.learn,
        run=lambda rows: (problem.run(rows),) * 2,
        targets=SimpleNamespace(batch=lambda rows: (problem.targets.batch(rows),) * 2),
    )
    assert not correct_bias(pair, [layer])  # type: ignore[arg-type]
