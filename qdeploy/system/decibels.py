"""Signal-to-noise ratios in dB: of all elements, of each row, and the distance of outputs from expected ones."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EXACT_DB = 200.0  # reported for what is equal bit for bit, whose ratio is infinite
SAME_DB = 80.0  # rows at or above agree except for the last bits of float arithmetic


def powers(output: Tensor, expected: Tensor) -> tuple[float, float]:
    """Sums of squares of the signal and of the noise, in double precision."""
    signal, noise = expected.double(), output.double() - expected.double()
    return float(signal.square().sum()), float(noise.square().sum())


def decibels(signal: float, noise: float) -> float:
    """The ratio of signal to noise in dB, within +-`EXACT_DB`; 200 for equality, also where both are 0."""
    if noise == 0:
        return EXACT_DB
    ratio = signal / noise
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(ratio))) if ratio > 0 else -EXACT_DB


def sqnr_db(output: Tensor, expected: Tensor) -> float:
    """SQNR over all elements together, in dB; 200 where the two are equal."""
    return decibels(*powers(output, expected))


def sqnr_by_row(output: Tensor, expected: Tensor) -> list[float]:
    """SQNR of every row of ``[rows, ...]``, in dB."""
    return [sqnr_db(one, other) for one, other in zip(output, expected, strict=True)]


def distance(output: Tensor, expected: Tensor) -> dict[str, Any]:
    """The distance of outputs ``[rows, ...]`` from expected ones.

    Returns:
        ``sqnr_db``, the median over rows; ``worst_db``, the worst row; ``pooled_db``, over all elements;
        ``same_rows``, the share of rows that agree except for the last bits; and ``max_abs``.
    """
    rows = sqnr_by_row(output, expected)
    return {
        "sqnr_db": round(median(rows), 2),
        "worst_db": round(min(rows), 2),
        "pooled_db": round(sqnr_db(output, expected), 2),
        "same_rows": round(sum(row >= SAME_DB for row in rows) / len(rows), 4),
        "max_abs": float((output.double() - expected.double()).abs().max()),
    }
