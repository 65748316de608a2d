"""Budgets in words: ``size=3.2MB``, ``size=50%``, ``macs=40G``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qdeploy.system.errors import UsageError

SIZE, MACS = "size", "macs"
_UNITS = {
    SIZE: {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    MACS: {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
}
_WORD = re.compile(r"(size|macs)\s*=\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*|%)")


@dataclass(frozen=True)
class Limit:
    """A bound on one cost.

    Attributes:
        cost: ``size`` (bytes) or ``macs`` (bit-operations per sample).
        amount: the bound, or a share of the cost in full precision.
        share: which of the two ``amount`` is.
    """

    cost: str
    amount: float
    share: bool

    def bound(self, full: int) -> int:
        """The bound, for a network that costs ``full`` in 32-bit floats."""
        return int(self.amount * full) if self.share else round(self.amount)


def parse_budget(words: str | Sequence[str]) -> dict[str, Limit]:
    """Limits by cost, from words such as ``size=50%`` or ``size=3.2MB,macs=40G``.

    Raises:
        UsageError: a word is no budget, or two limit the same cost.
    """
    given = [words] if isinstance(words, str) else list(words)
    limits: dict[str, Limit] = {}
    for word in [part.strip() for one in given for part in one.split(",")]:
        found = _WORD.fullmatch(word)
        cost, number, unit = found.groups() if found else ("", "0", "")
        scale = 0.01 if unit == "%" else _UNITS.get(cost, {}).get(unit.upper())
        if not found or scale is None or float(number) == 0:
            raise UsageError(
                f"{word!r} is no budget: write size=3.2MB, size=50%, macs=40G or macs=5% (bit-operations)"
            )
        if cost in limits:
            raise UsageError(f"two budgets limit {cost}: keep one")
        limits[cost] = Limit(cost, float(number) * scale, unit == "%")
    return limits


def in_words(cost: str, amount: int) -> str:
    """A cost as `parse_budget` reads it, rounded up, so that what costs as much fits."""
    units = [("GB", 10**9), ("MB", 10**6), ("kB", 10**3)] if cost == SIZE else [("G", 10**9), ("M", 10**6)]
    unit, scale = next(((name, scale) for name, scale in units if amount >= scale), ("", 1))
    thousandths = -(-amount * 1000 // scale)
    number = f"{thousandths // 1000}.{thousandths % 1000:03d}".rstrip("0").rstrip(".")
    return f"{cost}={number}{unit}"
