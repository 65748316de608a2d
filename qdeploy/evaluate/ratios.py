"""Ratios of speed and of size in words: a ratio whose quartiles hold 1 is no difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NO_DIFFERENCE = "no difference seen"
_EQUAL = 0.02  # sizes that differ by less are equal


class Judgement(NamedTuple):
    """Whether one side of an engine is as it should be.

    Attributes:
        what: ``speed``, ``quality`` or ``size``.
        word: ``pass``, ``warn`` or ``fail``.
        reason: a few words.
    """

    what: str
    word: str
    reason: str

    @property
    def tone(self) -> str:
        """The class of style that the page gives it."""
        return {"pass": "good", "warn": "warn", "fail": "bad"}[self.word]


def is_seen(spread: Sequence[float] | None) -> bool:
    """Whether a ratio differs from 1: it does in three of four rounds, so that 1 is outside its quartiles."""
    return spread is None or spread[0] > 1 or spread[1] < 1


def in_words(ratio: float, spread: Sequence[float] | None, times: str = "x") -> str:
    """A ratio with its quartiles, as in ``1.76x (1.70 to 1.81)`` or ``no difference seen (0.67 to 1.27)``.

    Args:
        ratio: the median over rounds.
        spread: the quartiles over rounds, if they are known.
        times: the sign behind the number.
    """
    quartiles = f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else ""
    return f"{f'{ratio:.2f}{times}' if is_seen(spread) else NO_DIFFERENCE}{quartiles}"


def judge_speed(kind: str, ratio: float, spread: Sequence[float] | None) -> Judgement:
    """An engine is faster than the baseline (pass), no different (warn), or slower (fail).

    Args:
        kind: precision of the baseline.
        ratio: how many times as fast as it.
        spread: quartiles of the ratio over rounds.
    """
    word = "warn" if not is_seen(spread) else "pass" if ratio > 1 else "fail"
    return Judgement("speed", word, f"{in_words(ratio, spread, '×')}, against {kind}")  # noqa: RUF001


def judge_size(own: float, baseline: float) -> Judgement:
    """An engine is smaller than the baseline in MB (pass), as large (warn), or larger (fail)."""
    share = own / baseline
    word = "pass" if share < 1 - _EQUAL else "fail" if share > 1 + _EQUAL else "warn"
    return Judgement("size", word, f"{own:.1f} MB, {baseline:.1f} in full precision")


def judge_quality(failures: Sequence[str]) -> Judgement:
    """The checks passed or failed."""
    return Judgement(
        "quality", "fail" if failures else "pass", "; ".join(failures) or "within its thresholds"
    )
