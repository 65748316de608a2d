"""Number formats, as data.

An integer format stores codes ``q`` that represent ``x = (q - zero_point) * scale``. Symmetric formats
have zero point 0 and a range that is used symmetrically: scale = absmax / qmax. A float format stores small
floats; it is symmetric, and its grid is finer near zero. NVFP4 stores float4 codes (E2M1) in blocks of 16 features,
each with a float8 scale (E4M3), and one scale for the whole tensor (`qdeploy.quant.nvfp4`).
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: the word that recipes use.
        bits: width of a code.
        symmetric: zero point fixed at 0 and signed codes; otherwise unsigned codes with a zero point.
        block: input features that share a scale, for weights of linear layers; 0 for one scale per channel.
        largest: the largest code of a float format; 0 for integers.
        fraction: bits of a float format's fraction.
        exponent: of a float format's smallest normal number.
        dynamic: whether the runtime finds scales for activations itself, call by call (`qdeploy.quant.dynamic`).
    """

    name: str
    bits: int
    symmetric: bool
    block: int = 0
    largest: int = 0
    fraction: int = 0
    exponent: int = 0
    dynamic: bool = False

    @property
    def floating(self) -> bool:
        """Whether codes are floats, so that the steps between them differ."""
        return self.largest > 0

    @property
    def two_levels(self) -> bool:
        """Whether blocks have float8 scales, and the tensor one scale above them."""
        return self.floating and self.block > 0

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.floating:
            return -self.largest
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.floating:
            return self.largest
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def short(self) -> str:
        """How precisions are written: ``8``, ``f8`` for floats, ``8d`` for dynamic, ``4g128`` for groups of 128."""
        kind = f"g{self.block}" if self.block else "d" if self.dynamic else ""
        return f"{'f' if self.floating else ''}{self.bits}{kind}"

    def fitting(self, features: int) -> Format | None:
        """This format for a weight of so many input features.

        Returns:
            Itself where they are whole blocks, else the same with the largest smaller block that divides
            them; None if there is none.
        """
        if not self.block:
            return self
        if self.two_levels:
            return None if features % self.block else self
        sizes = [size for size in BLOCKS if size <= self.block and features % size == 0]
        return blocked(self.bits, max(sizes)) if sizes else None


def integer(bits: int) -> Format:
    """The symmetric, signed format of ``bits`` bits."""
    return Format(f"int{bits}", bits, symmetric=True)


def unsigned(bits: int) -> Format:
    """The asymmetric format of ``bits`` bits, with a zero point."""
    return Format(f"uint{bits}", bits, symmetric=False)


def blocked(bits: int, block: int) -> Format:
    """The symmetric format of ``bits`` bits with a scale for each block of input features."""
    return Format(f"int{bits}b{block}", bits, symmetric=True, block=block)


BLOCKS = (32, 64, 128)  # TensorRT has no kernels for 32

int8, int7, int6, int5, int4, int3 = (integer(bits) for bits in (8, 7, 6, 5, 4, 3))
uint8, uint6, uint4 = unsigned(8), unsigned(6), unsigned(4)
int4b32, int4b64, int4b128 = (blocked(4, block) for block in BLOCKS)
int8b32, int8b64, int8b128 = (blocked(8, block) for block in BLOCKS)
int8_dynamic = Format("int8-dynamic", 8, symmetric=True, dynamic=True)
fp8 = Format("fp8", 8, symmetric=True, largest=448, fraction=3, exponent=-6)  # E4M3FN: without infinities
nvfp4 = Format("nvfp4", 4, symmetric=True, block=16, largest=6, fraction=1)  # E2M1
FORMATS = {
    f.name: f
    for f in (
        *(int8, uint8, int7, int6, uint6, int5, int4, uint4, int3),
        *(int4b32, int4b64, int4b128, int8b32, int8b64, int8b128),
        *(fp8, nvfp4, int8_dynamic),
    )
}
NONE = "none"
# Formats of the softmax output. Of these an engine has int8 kernels for the first; the last leaves it in float, as
# engines do that compute "16 bits".
SOFTMAX: dict[str, Format | None] = {
    "uint8": uint8,
    "uint16": unsigned(16),
    "uint6": uint6,
    "uint4": uint4,
    "int8": int8,
    NONE: None,
}


def parse_format(name: str) -> Format | None:
    """The format of that name; None for ``none``, which leaves tensors as they are.

    Raises:
        UsageError: there is no such format.
    """
    if name == NONE:
        return None
    if name not in FORMATS:
        raise UsageError(unknown("number format", name, [*FORMATS, NONE]))
    return FORMATS[name]
