"""Number formats, as data.

An integer format stores codes ``q`` and stands for ``x = (q - zero_point) * scale``. Symmetric formats
have zero point 0 and a range that is used symmetrically: scale = absmax / qmax.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.errors import UsageError


@dataclass(frozen=True)
class Format:
    """An integer number format.

    Attributes:
        name: the word that recipes use.
        bits: width of a code.
        symmetric: zero point fixed at 0 and signed codes; otherwise unsigned codes with a zero point.
    """

    name: str
    bits: int
    symmetric: bool

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


def integer(bits: int) -> Format:
    """The symmetric, signed format of ``bits`` bits."""
    return Format(f"int{bits}", bits, symmetric=True)


def unsigned(bits: int) -> Format:
    """The asymmetric format of ``bits`` bits, with a zero point."""
    return Format(f"uint{bits}", bits, symmetric=False)


int8, int6, int4 = integer(8), integer(6), integer(4)
uint8, uint6, uint4 = unsigned(8), unsigned(6), unsigned(4)
FORMATS = {f.name: f for f in (int8, uint8, int6, uint6, int4, uint4)}
NONE = "none"


def parse_format(name: str) -> Format | None:
    """The format of that name; None for ``none``, which leaves tensors as they are.

    Raises:
        UsageError: there is no such format.
    """
    if name == NONE:
        return None
    if name not in FORMATS:
        raise UsageError(f"unknown number format {name!r}: choose from {', '.join([*FORMATS, NONE])}")
    return FORMATS[name]
