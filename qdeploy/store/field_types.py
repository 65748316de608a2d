"""Types of the fields of manifests: numbers in range, words and names of bounded length."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Word = Annotated[str, Meta(min_length=1, max_length=200)]
Identifier = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$(?!\n)", max_length=100)]
Component = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*$(?!\n)", max_length=64)]
Count = Annotated[int, Meta(ge=0, le=2**48)]
Positive = Annotated[int, Meta(ge=1, le=2**48)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
LARGEST_TIMESTEP = 1e9
Timestep = (
    Annotated[int, Meta(ge=-(10**9), le=10**9)]
    | Annotated[float, Meta(ge=-LARGEST_TIMESTEP, le=LARGEST_TIMESTEP)]
)
Number = Annotated[int, Meta(ge=-(2**63) + 1, le=2**63 - 1)] | float
Size = Annotated[list[Positive], Meta(min_length=2, max_length=2)]
Formats = Annotated[list[Word], Meta(max_length=64)]
