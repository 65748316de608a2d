"""Confidence intervals: of means, of shares, and of anything computed from many images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CONFIDENCE = 0.95
GROUPS = 10
Interval = list[float]


def of_mean(values: Sequence[float]) -> Interval | None:
    """Student's interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    numbers = torch.tensor(values, dtype=torch.float64)
    return _around(float(numbers.mean()), float(numbers.std()) / math.sqrt(len(values)), len(values) - 1)


def of_median(values: Sequence[float]) -> Interval | None:
    """The sign test's interval of a median: two of the values (Conover 1999, 3.2); None below six of them."""
    from scipy.stats import binom

    ordered = sorted(values)
    outside = int(
        binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5)
    )  # values on each side that may lie beyond
    return None if outside < 1 else [ordered[outside - 1], ordered[-outside]]


def of_share(hits: int, count: int) -> Interval:
    """Wilson's score interval of a share of independent cases (Wilson 1927, equation 5)."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    share = hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def of_statistic(statistic: Callable[[Tensor], float], count: int) -> Interval | None:
    """The grouped jackknife's interval of a statistic of images (Efron & Tibshirani 1993, chapter 11).

    Image i is in group i modulo `GROUPS`; the statistic is computed without each group in turn. Nothing is
    drawn at random, and no image counts twice, which would bias Fréchet distances and neighbourhoods.

    Args:
        statistic: of the images whose numbers it is given.
        count: images; fewer than two groups of two give None.
    """
    groups = groups_of(count)
    if groups < 2:
        return None
    member = torch.arange(count) % groups
    left_out = [statistic((member != group).nonzero().flatten()) for group in range(groups)]
    return of_left_out(statistic(torch.arange(count)), left_out)


def groups_of(count: int) -> int:
    """How many groups the jackknife makes of so many images; it takes two at least."""
    return min(GROUPS, count // 2)


def of_left_out(whole: float, left_out: Sequence[float]) -> Interval:
    """The grouped jackknife's interval, from the statistic of all images and of those without each group."""
    groups, values = len(left_out), torch.tensor(left_out, dtype=torch.float64)
    error = math.sqrt((groups - 1) / groups * float((values - values.mean()).square().sum()))
    return _around(whole, error, groups - 1)


def _around(middle: float, error: float, freedom: int) -> Interval:
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return [middle - half, middle + half]


def rounded(interval: Interval | None, digits: int, least: float = -math.inf) -> Interval | None:
    """An interval for a report; its ends no lower than ``least``."""
    return None if interval is None else [round(max(least, end), digits) for end in interval]
