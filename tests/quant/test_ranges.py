"""Range finders: zero is a code, nothing saturates that need not, and the order of rows means nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeploy.quant.activation_finders import ACTIVATION_FINDERS
from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.operators import fake_quantize, over_weight, to_grid
from qdeploy.quant.ranges import (
    SHRINKS,
    WEIGHT_FINDERS,
    check_finder,
    lp_weights,
    minmax_weights,
    to_scale,
)
from qdeploy.recipe.formats import FORMATS, Format, fp8, int4, int4b64, int4b128, int8, uint4, uint8
from qdeploy.system.errors import UsageError

Finder = Callable[[ActivationStatistics, Format], tuple[Tensor, Tensor]]
PLAIN = [number_format for number_format in FORMATS.values() if not number_format.block]
INTEGERS = [number_format for number_format in PLAIN if not number_format.floating]
all_formats = pytest.mark.parametrize("number_format", INTEGERS, ids=lambda f: f.name)
all_finders = pytest.mark.parametrize("finder", ACTIVATION_FINDERS.values(), ids=list(ACTIVATION_FINDERS))


def statistics_of(rows: Tensor, batch: int = 8) -> ActivationStatistics:
    statistics = ActivationStatistics()
    for part in rows.split(batch):
        statistics.observe(part)
    return statistics


def quantized(x: Tensor, scale: Tensor, zero: Tensor, number_format: Format) -> Tensor:
    return fake_quantize(x, scale, zero, number_format.qmin, number_format.qmax)


def drifting_rows(rows: int = 160) -> Tensor:
    """Rows sorted by timestep: the range grows as the noise does."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 4, 5, generator=generator) * torch.linspace(0.2, 4, rows)[:, None, None]


# -- one range ---------------------------------------------------------------------------------------------


@all_formats
@all_finders
def test_codes_lie_on_the_grid_of_their_bits(finder: Finder, number_format: Format) -> None:
    """P6. QUEST-3, QUEST-8: 8 bits without regard to the sign have 514 levels. QUEST-4: a search loses half."""
    for offset in (0.0, 5.0, -5.0):  # ranges that lie on both sides of zero, and on one
        rows = torch.randn(64, 400, generator=torch.Generator().manual_seed(1)) + offset
        scale, zero = finder(statistics_of(rows), number_format)
        wide = torch.linspace(-100, 100, 20_001)
        codes = (quantized(wide, scale, zero, number_format) / scale).round() + zero
        assert len(codes.unique()) <= 2**number_format.bits
        assert codes.amin() >= number_format.qmin
        assert codes.amax() <= number_format.qmax
        assert zero == 0 or not number_format.symmetric
        error = (quantized(rows, scale, zero, number_format) - rows).square().mean() / rows.square().mean()
        assert error < 16.0 * 4.0**-number_format.bits + 2e-3  # rounding, and what a finder clips


@given(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.floats(0, 2.0**99, width=32),
    st.sampled_from(list(FORMATS.values())),
)
def test_every_range_gives_a_positive_scale_and_a_code_for_zero(
    low: float, span: float, number_format: Format
) -> None:
    scale, zero = to_scale(torch.tensor(low), torch.tensor(low + span), number_format)
    assert scale > 0
    assert torch.isfinite(scale)
    assert number_format.qmin <= zero <= number_format.qmax
    assert quantized(torch.zeros(()), scale, zero, number_format) == 0


@all_formats
def test_symmetric_formats_have_zero_point_0_and_use_their_range_symmetrically(number_format: Format) -> None:
    scale, zero = to_scale(torch.tensor(-3.0), torch.tensor(2.0), number_format)
    if number_format.symmetric:
        assert zero == 0
        assert scale * number_format.qmax == pytest.approx(3.0)
    else:
        assert scale * (number_format.qmax - number_format.qmin) == pytest.approx(5.0)


@all_formats
@pytest.mark.parametrize(("low", "high"), [(5.0, 6.0), (-6.0, -5.0), (5.0, 5.0), (-1e-6, 1e-6), (0.0, 0.0)])
def test_ranges_that_do_not_span_zero_do_not_saturate(number_format: Format, low: float, high: float) -> None:
    """QD-4: a step from the raw range with a zero point from the clamped one cuts [5, 6] off at 1."""
    x = torch.linspace(low, high, 101)
    scale, zero = to_scale(x.min(), x.max(), number_format)
    error = (quantized(x, scale, zero, number_format) - x).abs().max()
    assert error <= scale * 0.501
    if low != high:
        assert scale * number_format.qmax <= (max(high, 0) - min(low, 0)) * 1.001  # no step is wasted either


# -- weights -----------------------------------------------------------------------------------------------


@all_formats
@pytest.mark.parametrize("finder", WEIGHT_FINDERS.values(), ids=list(WEIGHT_FINDERS))
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 40), (1, 1), (3, 2, 5)])
def test_each_output_channel_is_quantized_on_its_own(
    number_format: Format, finder: Callable[[Tensor, Format], tuple[Tensor, Tensor]], shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale, zero = finder(weight, number_format)
    assert scale.shape == zero.shape == (shape[0],)
    for channel in range(shape[0]):
        alone = finder(weight[channel : channel + 1], number_format)
        assert torch.equal(torch.stack([scale[channel], zero[channel].float()]), torch.cat(alone).float())


@all_formats
def test_minmax_covers_every_weight(number_format: Format) -> None:
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    scale, zero = minmax_weights(weight, number_format)
    error = (quantized(weight, scale[:, None], zero[:, None], number_format) - weight).abs()
    # The rounding of the zero point moves the ends of an asymmetric grid by half a step.
    assert torch.all(error <= scale[:, None] * (0.501 if number_format.symmetric else 1.001))


@all_formats
def test_the_lp_search_never_scores_worse_than_minmax(number_format: Format) -> None:
    weight = torch.randn(16, 90, generator=torch.Generator().manual_seed(2)).pow(3)
    scores = []
    for scale, zero in (lp_weights(weight, number_format), minmax_weights(weight, number_format)):
        hat = quantized(weight, scale[:, None], zero[:, None], number_format)
        scores.append((weight - hat).abs().pow(2.4).mean(1))
    assert torch.all(scores[0] <= scores[1])
    assert scores[0].sum() < scores[1].sum() or number_format.bits == 8


@all_formats
def test_the_lp_search_chooses_the_best_of_its_80_candidates(number_format: Format) -> None:
    """QD-3: a search on another grid than the one that is used later misses the best candidate.

    The oracle is a loop over candidates in numpy that knows nothing of the library's operators.
    """
    weight = torch.randn(5, 60, generator=torch.Generator().manual_seed(4)).pow(3)
    scale, zero = lp_weights(weight, number_format)
    full, _ = minmax_weights(weight, number_format)
    codes = np.round(weight.numpy() / scale.numpy()[:, None]) + zero.numpy()[:, None]
    assert codes.min() <= number_format.qmin or codes.max() >= number_format.qmax
    for channel, values in enumerate(weight.numpy()):
        oracle = [score(values, shrink, number_format) for shrink in SHRINKS]
        best = SHRINKS[int(np.argmin(oracle))]
        assert float(scale[channel] / full[channel]) == pytest.approx(best, rel=1e-4)
        if number_format.symmetric:
            assert zero[channel] == 0


def score(values: np.ndarray, shrink: float, number_format: Format) -> float:
    low, high = min(values.min() * shrink, 0), max(values.max() * shrink, 0)
    if number_format.symmetric:
        step, zero = max(-low, high) / number_format.qmax, 0.0
    else:
        step = (high - low) / (2**number_format.bits - 1)
        zero = np.round(-low / step)
    codes = np.clip(np.round(values / step) + zero, number_format.qmin, number_format.qmax)
    return float(np.mean(np.abs((codes - zero) * step - values) ** 2.4))


def test_shrinks_are_those_of_the_released_code() -> None:
    assert len(SHRINKS) == 80
    assert SHRINKS[0] == 1.0
    assert SHRINKS[-1] == pytest.approx(0.21)


# -- activations -------------------------------------------------------------------------------------------


@all_finders
@pytest.mark.parametrize("number_format", [int8, uint8, int4, uint4], ids=lambda f: f.name)
def test_a_range_does_not_depend_on_the_order_of_the_rows(finder: Finder, number_format: Format) -> None:
    """QD-6: calibration rows are sorted by timestep; an average over batches keeps the last few only."""
    rows = drifting_rows()
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    found = [finder(statistics_of(order), number_format) for order in (rows, rows.flip(0), shuffled)]
    found.append(finder(statistics_of(rows, batch=5), number_format))
    for scale, zero in found[1:]:
        assert scale == pytest.approx(float(found[0][0]), rel=1e-6)
        assert abs(int(zero) - int(found[0][1])) <= (number_format.symmetric is False)


def test_the_running_average_of_the_released_code_would_depend_on_it() -> None:
    """The rows above do catch the trap: an exponential average over sorted batches differs by far."""

    def average(rows: Tensor) -> float:
        high = float(rows[:8].max())
        for batch in rows.split(8)[1:]:
            high = 0.95 * high + 0.05 * float(batch.max())
        return high

    rows = drifting_rows()
    assert average(rows) > 1.05 * average(rows.flip(0)) or average(rows.flip(0)) > 1.05 * average(rows)


def test_minmax_covers_a_single_outlier() -> None:
    rows = torch.zeros(4, 10_000)
    rows[2, 777] = 9.0
    scale, _ = ACTIVATION_FINDERS["minmax"](statistics_of(rows), int8)
    assert scale * 127 == pytest.approx(9.0)


def test_percentile_leaves_outliers_outside() -> None:
    rows = torch.linspace(-1, 1, 100_000).view(100, 1000).clone()
    rows[0, 0] = 1000.0
    scale, _ = ACTIVATION_FINDERS["percentile"](statistics_of(rows), int8)
    assert scale * 127 == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("number_format", [int8, int4, uint4], ids=lambda f: f.name)
def test_lp_scores_no_worse_than_minmax_on_what_it_has_seen(number_format: Format) -> None:
    rows = torch.randn(40, 100, generator=torch.Generator().manual_seed(5)).pow(3)
    scores = []
    for name in ("lp", "minmax"):
        found = ACTIVATION_FINDERS[name](statistics_of(rows), number_format)
        scores.append((quantized(rows, *found, number_format) - rows).abs().pow(2.4).mean())
    assert scores[0] < scores[1]


@all_finders
def test_constant_and_empty_looking_tensors_do_not_saturate(finder: Finder) -> None:
    for value in (0.0, 3.0, -3.0):
        x = torch.full((8, 7), value)
        scale, zero = finder(statistics_of(x), uint8)
        assert (quantized(x, scale, zero, uint8) - x).abs().max() <= 0.25 * abs(value)  # lp may shrink it


def test_unknown_finders_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="minmax, percentile, running, lp, mse, entropy"):
        check_finder("nosuch", ACTIVATION_FINDERS)


# -- blocks and floats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number_format", [int4b64, int4b128], ids=lambda f: f.name)
@pytest.mark.parametrize("finder", WEIGHT_FINDERS.values(), ids=list(WEIGHT_FINDERS))
def test_each_block_is_quantized_on_its_own(
    number_format: Format, finder: Callable[[Tensor, Format], tuple[Tensor, Tensor]]
) -> None:
    """As if every block were an output channel of its own."""
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).pow(3)
    scale, zero = finder(weight, number_format)
    alone, _ = finder(weight.reshape(-1, number_format.block), int4)
    assert scale.shape == zero.shape == (3, 256 // number_format.block)
    assert torch.equal(scale.flatten(), alone)
    assert not zero.any()


def test_smaller_blocks_and_the_search_bring_weights_closer() -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)).pow(3)

    def error(found: tuple[Tensor, Tensor], number_format: Format) -> float:
        scale, zero = (over_weight(values, weight.shape) for values in found)
        return float((weight - to_grid(weight, scale, zero, number_format)).abs().pow(2.4).mean())

    coarse, middle, fine = (error(minmax_weights(weight, f), f) for f in (int4, int4b128, int4b64))
    assert fine < middle < coarse
    for number_format in (int4b128, fp8):
        searched = error(lp_weights(weight, number_format), number_format)
        assert searched <= error(minmax_weights(weight, number_format), number_format)


def test_the_scales_are_those_that_other_tools_compute() -> None:
    """The largest magnitude over 448 and over 7, as nvidia-modelopt has it."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(5))
    assert torch.equal(minmax_weights(weight, fp8)[0], weight.abs().amax(1) / 448)
    assert torch.equal(minmax_weights(weight, int4b128)[0], weight.abs().amax(1, keepdim=True) / 7)
