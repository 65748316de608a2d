"""Ranges of activations, held against brute force over the whole population that the statistics were taken of."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qdeploy.quant.activation_finders import ACTIVATION_FINDERS, channel_ranges, lp, mse, percentile, running
from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.histogram import Histogram
from qdeploy.quant.operators import to_grid
from qdeploy.quant.ranges import to_scale
from qdeploy.recipe.formats import Format, fp8, int4, int8, uint4, uint8

ROWS, SIZE = 512, 256


def _draw(make: Callable[[torch.Generator], Tensor], seed: int = 0) -> Tensor:
    return make(torch.Generator().manual_seed(seed)).view(-1, SIZE)


def _laplace(generator: torch.Generator) -> Tensor:
    exponential = torch.empty(ROWS * SIZE).exponential_(generator=generator)
    return exponential * torch.randint(0, 2, (ROWS * SIZE,), generator=generator).mul(2).sub(1)


def _student(generator: torch.Generator) -> Tensor:
    chi = torch.randn(6, ROWS * SIZE, generator=generator).square().sum(0)
    return torch.randn(ROWS * SIZE, generator=generator) / (chi / 6).sqrt()


def _softmax(generator: torch.Generator) -> Tensor:
    return (3 * torch.randn(ROWS * SIZE // 64, 64, generator=generator)).softmax(-1)


POPULATIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda generator: torch.randn(ROWS * SIZE, generator=generator),
    "laplace": _laplace,
    "student t": _student,
    "silu": lambda generator: torch.nn.functional.silu(3 * torch.randn(ROWS * SIZE, generator=generator)),
    "softmax": _softmax,
}
FORMATS = [int8, uint8, int4]


def statistics_of(rows: Tensor, batch: int = 32) -> ActivationStatistics:
    statistics = ActivationStatistics()
    for part in rows.split(batch):
        statistics.observe(part)
    return statistics


def error(rows: Tensor, found: tuple[Tensor, Tensor], number_format: Format, p: float) -> float:
    """The true mean error over a population."""
    hat = to_grid(rows, found[0].float(), found[1], number_format)
    return float((hat - rows).abs().double().pow(p).mean())


def least_error(rows: Tensor, number_format: Format, p: float) -> float:
    """By brute force: both ends shrunk jointly, then either end by itself in ever finer steps."""
    low, high = rows.min().clamp(max=0), rows.max().clamp(min=0)

    def score(a: float, b: float) -> float:
        return error(rows, to_scale(low * a, high * b, number_format), number_format, p)

    best = min((score(a, a), a, a) for a in torch.linspace(0.02, 1, 50).tolist())
    for width in (0.3, 0.1, 0.03):
        for end in (0, 1) if not number_format.symmetric else (0,):
            ends = best[1:]
            for step in torch.linspace(1 - width, 1 + width, 13).tolist():
                moved = [ends[0] * step, ends[1]] if end == 0 else [ends[0], ends[1] * step]
                if number_format.symmetric:
                    moved = [ends[0] * step] * 2
                a, b = (min(1.0, value) for value in moved)
                best = min(best, (score(a, b), a, b))
    return best[0]


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("population", POPULATIONS.values(), ids=list(POPULATIONS))
def test_searched_ranges_come_within_2_percent_of_the_least_error(
    population: Callable[[torch.Generator], Tensor], number_format: Format
) -> None:
    rows = _draw(population)
    statistics = statistics_of(rows)
    for finder, p in ((lp, 2.4), (mse, 2.0)):
        reached = error(rows, finder(statistics, number_format), number_format, p)
        assert reached <= 1.02 * least_error(rows, number_format, p)


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("population", POPULATIONS.values(), ids=list(POPULATIONS))
def test_the_error_read_from_the_histogram_is_that_of_the_population(
    population: Callable[[torch.Generator], Tensor], number_format: Format
) -> None:
    rows = _draw(population)
    statistics = statistics_of(rows)
    for shrink in (1.0, 0.7, 0.4):
        found = to_scale(
            torch.tensor([[statistics.low * shrink]]),
            torch.tensor([[statistics.high * shrink]]),
            number_format,
        )
        read = float(statistics.histogram.error(*found, number_format, 2.4))
        assert read == pytest.approx(error(rows, (found[0][0], found[1][0]), number_format, 2.4), rel=0.03)


@pytest.mark.parametrize("population", POPULATIONS.values(), ids=list(POPULATIONS))
def test_more_rows_are_never_worse(population: Callable[[torch.Generator], Tensor]) -> None:
    """A sample whose size falls as rows are added finds worse ranges the more is asked for."""
    rows = _draw(population)
    for number_format in (int8, int4):
        errors = [
            error(rows, lp(statistics_of(rows[:count]), number_format), number_format, 2.4)
            for count in (32, 128, 512)
        ]
        assert errors[2] <= 1.005 * min(errors)


@pytest.mark.parametrize("finder", ACTIVATION_FINDERS.values(), ids=list(ACTIVATION_FINDERS))
@pytest.mark.parametrize("number_format", [int8, uint4], ids=lambda f: f.name)
def test_neither_the_order_of_rows_nor_batches_change_a_bit(
    finder: Callable[..., tuple[Tensor, Tensor]], number_format: Format
) -> None:
    rows = _draw(_student)[:100] * torch.linspace(0.2, 4, 100)[:, None]
    expected = finder(statistics_of(rows), number_format)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    for other in (statistics_of(rows.flip(0), 7), statistics_of(shuffled, 1), statistics_of(rows, 100)):
        assert all(torch.equal(a, b) for a, b in zip(finder(other, number_format), expected, strict=True))


def test_a_percentile_is_one() -> None:
    """Extremes of rows at equal weight made 99.99 % cover 4.75 of a normal's 3.72."""
    for population in (POPULATIONS["normal"], _laplace, _student):
        rows = _draw(population)
        scale, _ = percentile(statistics_of(rows), int8)
        expected = max(-rows.flatten().quantile(1e-4), rows.flatten().quantile(1 - 1e-4))
        assert float(scale) * 127 == pytest.approx(float(expected), rel=0.01)


def test_running_is_what_momentum_over_shuffled_batches_tends_to() -> None:
    """The reference's average, over many shuffles, has the computed mean."""
    rows = _draw(_laplace)[:96] * torch.linspace(0.2, 2, 96)[:, None]
    scale, _ = running(statistics_of(rows), int8)
    generator, averages = torch.Generator().manual_seed(0), []
    lows, highs = rows.amin(1), rows.amax(1)
    for _ in range(400):
        batches = torch.randperm(96, generator=generator).split(16)
        low, high = lows[batches[0]].min(), highs[batches[0]].max()
        for batch in batches[1:]:
            low, high = (0.95 * low + 0.05 * lows[batch].min(), 0.95 * high + 0.05 * highs[batch].max())
        averages.append([float(-low), float(high)])
    expected = torch.tensor(averages).mean(0).max()
    assert float(scale) * 127 == pytest.approx(float(expected), rel=0.02)
    assert float(scale) * 127 > 1.3 * float(torch.maximum(-lows.mean(), highs.mean()))


def test_running_over_at_most_one_batch_is_minmax() -> None:
    rows = _draw(_laplace)[:16]
    few = statistics_of(rows)
    assert torch.equal(running(few, int8)[0], ACTIVATION_FINDERS["minmax"](few, int8)[0])


def test_entropy_cuts_rare_outliers_and_keeps_a_uniform_range() -> None:
    uniform = torch.linspace(-1, 1, 2**16).view(64, -1)
    outliers = uniform.clone()
    outliers[0, :3] = 3.0
    entropy = ACTIVATION_FINDERS["entropy"]
    assert float(entropy(statistics_of(uniform), int8)[0]) * 127 == pytest.approx(1.0, rel=0.03)
    assert 1.0 <= float(entropy(statistics_of(outliers), int8)[0]) * 127 <= 1.2  # of the 3 that were seen


# -- histograms ----------------------------------------------------------------------------------------------


def test_every_value_is_counted_in_the_bin_that_holds_it() -> None:
    values = torch.cat(
        [
            torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5000),
            torch.zeros(17),
            torch.tensor([2.0**-40, -(2.0**-32), 1.0]),
        ]
    )
    histogram = Histogram()
    histogram.add(values)
    edges, counts = histogram.filled()
    assert int(counts.sum()) == len(values)
    zero = (edges == 0).all(1)
    assert int(counts[0, zero]) == 18  # and the one that is as good as zero
    for (left, right), count in zip(edges[~zero].tolist(), counts[0, ~zero].tolist(), strict=True):
        own = (values.double() >= left) & (values.double() <= right)
        assert count <= int(own.sum())
        assert right - left <= max(abs(left), abs(right)) / 32 + 1e-12


def test_merging_is_exact() -> None:
    parts = [torch.randn(1000) * scale for scale in (1e-4, 1.0, 300.0)]
    whole, merged = Histogram(), Histogram()
    whole.add(torch.cat(parts))
    for part in parts:
        one = Histogram()
        one.add(part)
        merged = merged.merged(one)
    assert torch.equal(whole.counts, merged.counts)
    assert (whole.low, whole.high) == (merged.low, merged.high)


def test_channels_are_found_as_if_each_were_alone() -> None:
    x = torch.randn(64, 5, 6, 6) * torch.tensor([0.1, 1, 3, 10, 1e-3])[:, None, None]
    statistics = ActivationStatistics(axis=1)
    statistics.observe(x)
    scale, zero_point = channel_ranges(statistics, "lp", int4)
    assert scale.shape == zero_point.shape == (5,)
    for channel in range(5):
        alone = ActivationStatistics(axis=1)
        alone.observe(x[:, channel : channel + 1])
        torch.testing.assert_close(
            channel_ranges(alone, "lp", int4)[0], scale[channel : channel + 1], rtol=0.03, atol=0
        )


def test_groups_of_timesteps_hold_their_own_rows() -> None:
    timesteps = torch.tensor([1.0, 5.0, 9.0, 5.0])
    x = torch.arange(1.0, 5.0)[:, None] * torch.ones(4, 6)
    statistics = ActivationStatistics(by_timestep=True)
    statistics.observe(x, timesteps)
    low, high = statistics.groups(torch.tensor([3.0]))
    assert (low.high, high.high) == (1.0, 4.0)
    assert (int(low.histogram.counts.sum()), int(high.histogram.counts.sum())) == (6, 18)


@pytest.mark.parametrize("finder", ["minmax", "percentile", "lp", "mse"])
def test_activations_in_fp8_stay_close(finder: str) -> None:
    rows = _draw(POPULATIONS["normal"])
    hat = to_grid(rows, *ACTIVATION_FINDERS[finder](statistics_of(rows), fp8), fp8)
    assert (hat - rows).square().sum() < 0.01 * rows.square().sum()
    assert math.isfinite(float(hat.abs().max()))
