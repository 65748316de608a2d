"""AdaRound: starts at the weight itself, ends on the grid, and beats rounding to nearest on unseen rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qdeploy.calibrate import rounding as rounding_module
from qdeploy.calibrate.methods import qdiffusion
from qdeploy.calibrate.methods.gptq import GPTQ, round_layer
from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.calibrate.rounding import (
    PAPER_LR,
    PAPER_STEPS,
    SoftRounding,
    annealed_beta,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    regularizer,
)
from qdeploy.calibrate.second_moments import Moments, read_vectors
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.operators import per_channel
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.quant.ranges import lp_weights, minmax_weights
from qdeploy.recipe.effort import EFFORTS
from qdeploy.recipe.formats import FORMATS, Format, int4, int8, uint4
from tests.helpers import bare_session, layer_problem, relative

EVERY = list(FORMATS.values())
all_formats = pytest.mark.parametrize("number_format", EVERY, ids=lambda f: f.name)
STEPS = EFFORTS["thorough"].rounding  # enough to settle, at the learning rate chosen for so few


def random_rounding(number_format: Format, seed: int = 0) -> tuple[Tensor, SoftRounding, WeightQuantizer]:
    """A weight, some of whose entries are clipped, with its rounding and a plain quantizer."""
    shape = (6, 128) if number_format.block else (6, 5, 3, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale, zero = minmax_weights(weight, number_format)
    quantizer = WeightQuantizer(number_format, *weight.shape[:2])
    quantizer.set(0.7 * scale, zero)
    return weight, SoftRounding(weight, quantizer.scale, quantizer.zero_point, number_format), quantizer


def unclipped(weight: Tensor, rounding: SoftRounding) -> Tensor:
    codes = rounding.floor + rounding.zero_point
    exact = weight / rounding.scale + rounding.zero_point
    inside: Tensor = (codes >= rounding.format.qmin) & (codes + rounding.gap <= rounding.format.qmax)
    return inside & (exact >= rounding.format.qmin)


# -- A1: the beginning -------------------------------------------------------------------------------------


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_h_of_the_initial_v_is_the_fraction(fraction: float) -> None:
    h = rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor(fraction)))
    assert abs(float(h) - fraction) <= 1e-6


@all_formats
def test_soft_rounding_begins_with_the_weight_itself(number_format: Format) -> None:
    weight, rounding, _ = random_rounding(number_format)
    inside = unclipped(weight, rounding)
    assert 0.5 < inside.float().mean() < 1
    error = ((rounding() - weight) / rounding.scale).abs()
    assert error[inside].max() <= 1e-4  # steps


@all_formats
def test_hard_rounding_begins_with_nearest(number_format: Format) -> None:
    weight, rounding, quantizer = random_rounding(number_format)
    assert torch.equal(rounding.codes(), quantizer.nearest(weight))


# -- A2: the end -------------------------------------------------------------------------------------------


@all_formats
@settings(deadline=None)
@given(seed=st.integers(0, 50))
def test_every_code_is_floor_or_ceiling_whatever_was_learned(number_format: Format, seed: int) -> None:
    weight, rounding, _ = random_rounding(number_format, seed)
    with torch.no_grad():
        rounding.v.copy_(10 * torch.randn(rounding.v.shape, generator=torch.Generator().manual_seed(seed)))
    below = rounding.floor + rounding.zero_point
    codes = rounding.codes().float()
    low, high = (c.clamp(number_format.qmin, number_format.qmax) for c in (below, below + rounding.gap))
    assert torch.all((codes == low) | (codes == high))
    inside = unclipped(weight, rounding)
    error = ((codes - rounding.zero_point) * rounding.scale - weight).abs()
    assert torch.all((error < rounding.scale * rounding.gap * (1 + 1e-4))[inside])


# -- A4: the regulariser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [2.0, 11.0, 20.0])
def test_the_regulariser_is_0_on_the_grid_and_1_halfway(beta: float) -> None:
    assert regularizer(torch.tensor([0.0, 1.0]), beta) == 0
    assert regularizer(torch.tensor([0.5]), beta) == 1
    assert regularizer(torch.full((3, 7), 0.5), beta) == 21  # a sum, not a mean


def test_beta_falls_linearly_from_20_to_2_after_the_warm_up() -> None:
    steps = 20_000
    assert all(annealed_beta(i, steps) is None for i in (0, 1, 3999))
    for iteration, beta in ((4000, 20), (8000, 15.5), (12_000, 11), (16_000, 6.5), (20_000, 2)):
        assert annealed_beta(iteration, steps) == pytest.approx(beta)


# -- A3 and A5: learning -----------------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[SoftRounding]:
    """The roundings that the method makes, in the state in which it leaves them."""
    seen: list[SoftRounding] = []

    class Spy(SoftRounding):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            seen.append(self)

    monkeypatch.setattr(rounding_module, "SoftRounding", Spy)
    return seen


def correlated_problem(
    number_format: Format, split: tuple[int, ...] = ()
) -> tuple[UnitProblem, QuantizedLayer]:
    """A 1x1 convolution whose input has 6 directions in 32 channels, so that errors can cancel."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 32, generator=generator)
    x = (torch.randn(96, 4, 4, 6, generator=generator) @ basis).permute(0, 3, 1, 2)
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    if split:
        x[:, split[0] :] *= 0.05
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Conv2d(32, 16, 1).requires_grad_(False)
    layer = QuantizedLayer(inner, number_format, None, split).requires_grad_(False)
    for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
        quantizer.set(*lp_weights(weight, number_format))  # type: ignore[operator]
    return layer_problem(layer, x.contiguous(), inner(x), learn=64), layer


def learn(problem: UnitProblem, layer: QuantizedLayer, steps: int = STEPS) -> float:
    rate = PAPER_LR * min(20.0, PAPER_STEPS / steps)
    return qdiffusion.round_unit(bare_session(), problem, [layer], "unit", steps, rate, 0.01, 0.2)


@pytest.mark.parametrize(
    ("number_format", "split"),
    [
        (int4, (8, 24)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((uint4, ()), (uint4, (8, 24)), (int8, (8, 24)))
        ),
    ],
    ids=str,
)
def test_roundings_settle_in_every_part_so_that_hardening_changes_nothing(
    number_format: Format, split: tuple[int, ...], spied: list[SoftRounding]
) -> None:
    """QD-1: a regulariser that leaves out the second half of a split layer leaves it undecided."""
    problem, layer = correlated_problem(number_format, split)
    learn(problem, layer)
    assert len(spied) == max(1, len(split))
    for rounding in spied:
        h = rounding.h()
        assert ((h < 0.01) | (h > 0.99)).float().mean() >= 0.99
    x = problem.run.inputs.tensors[0]
    soft, hard = (
        sum(map(nn.functional.conv2d, layer.input_parts(x), weights))
        for weights in ([rounding() for rounding in spied], layer.quantized_weights())
    )
    assert isinstance(soft, Tensor)
    assert isinstance(hard, Tensor)
    assert relative(hard, soft) < 1e-3


@pytest.mark.parametrize("split", [(), (8, 24)], ids=["joint", "split"])
@pytest.mark.parametrize("number_format", [int4, uint4], ids=lambda f: f.name)
def test_learned_rounding_beats_nearest_on_rows_that_it_has_not_seen(
    number_format: Format, split: tuple[int, ...]
) -> None:
    problem, layer = correlated_problem(number_format, split)
    nearest = problem.judged(p=2)
    gain = learn(problem, layer, steps=300)
    assert all(quantizer.codes is not None for quantizer in layer.weight_quantizers)
    assert problem.judged(p=2) < 0.75 * nearest
    assert gain == pytest.approx(problem.judged(p=2) / nearest)


def ruined(problem: UnitProblem, parameters: list[nn.Parameter], *args: object, **kwargs: object) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.neg_()


def test_nearest_is_kept_where_learning_made_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, layer = correlated_problem(int4, (8, 24))
    nearest = problem.judged(p=2)
    monkeypatch.setattr(rounding_module, "optimize", ruined)
    assert learn(problem, layer) == 1.0
    assert problem.judged(p=2) == nearest
    for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
        assert torch.equal(quantizer.codes, quantizer.nearest(weight))  # type: ignore[arg-type, operator]


def test_scales_and_the_float_weight_are_left_alone() -> None:
    problem, layer = correlated_problem(uint4)
    quantizer = layer.weight_quantizers[0]
    before = [quantizer.scale.clone(), quantizer.zero_point.clone(), layer.weight.clone()]  # type: ignore[operator]
    learn(problem, layer, steps=50)
    assert all(map(torch.equal, before, (quantizer.scale, quantizer.zero_point, layer.weight)))  # type: ignore[arg-type]


def test_two_runs_with_one_seed_give_the_same_codes() -> None:
    codes = []
    for _ in range(2):
        problem, layer = correlated_problem(int4)
        learn(problem, layer, steps=60)
        codes.append(layer.weight_quantizers[0].codes)
    assert torch.equal(*codes)  # type: ignore[arg-type]


def test_gradients_reach_only_weights_that_are_not_clipped() -> None:
    weight, rounding, _ = random_rounding(int4)
    rounding().sum().backward()
    assert rounding.v.grad is not None
    assert torch.all(rounding.v.grad[unclipped(weight, rounding)] > 0)
    far = (weight / per_channel(rounding.scale.flatten(), 4)).abs() > 8.5
    assert far.any()
    assert torch.all(rounding.v.grad[far] == 0)


# -- on from roundings that are decided, and no longer than it pays ------------------------------------------


def rounded_by_gptq(number_format: Format, split: tuple[int, ...] = ()) -> tuple[UnitProblem, QuantizedLayer]:
    problem, layer = correlated_problem(number_format, split)
    moments = Moments(layer, False)
    moments.add(
        read_vectors(layer, problem.run.inputs.tensors[0], 4096, torch.Generator().manual_seed(0)), None
    )
    round_layer(layer, moments, GPTQ())
    return problem, layer


def refined(problem: UnitProblem, layer: QuantizedLayer, steps: int, settle: float | None) -> float:
    return qdiffusion.round_unit(
        bare_session(), problem, [layer], "unit", steps, 0.01, 0.01, 0.2, settle=settle, refine=True
    )


@pytest.mark.parametrize("settle", [None, 0.0, 0.01])
def test_refining_never_leaves_a_unit_worse_than_gptq_left_it(settle: float | None) -> None:
    problem, layer = rounded_by_gptq(int4)
    before = problem.judged(p=2)
    gain = refined(problem, layer, 200, settle)
    assert gain <= 1
    assert problem.judged(p=2) == pytest.approx(gain * before)
    assert layer.weight_quantizers[0].rounding is None


@pytest.mark.parametrize("number_format", [int4, uint4], ids=lambda f: f.name)
def test_a_refined_rounding_begins_at_the_codes_and_may_go_one_code_towards_the_weight(
    number_format: Format,
) -> None:
    _, layer = rounded_by_gptq(number_format)
    ((quantizer, weight),) = layer.weight_pairs()
    assert quantizer.codes is not None
    rounding = SoftRounding(weight, quantizer.scale, quantizer.zero_point, number_format, quantizer.codes)
    assert torch.equal(rounding.codes(), quantizer.codes)
    exact = weight / rounding.scale + rounding.zero_point
    codes = quantizer.codes.float()
    other = 2 * rounding.floor + 1 + 2 * rounding.zero_point - codes
    assert torch.all((other - codes).abs() == 1)
    assert torch.all((other - codes) * (exact - codes) >= 0)


def test_learning_stops_when_held_out_rows_gain_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    plain = rounding_module.annealed_beta
    monkeypatch.setattr(
        rounding_module, "annealed_beta", lambda step, *rest: taken.append(step) or plain(step, *rest)
    )
    problem, layer = rounded_by_gptq(int4)
    refined(problem, layer, 200, settle=0.9)  # nothing gains nine tenths: over after the warm-up
    assert len(taken) < 100
