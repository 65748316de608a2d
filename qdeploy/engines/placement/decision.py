"""What a placement decided, and why, in numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdeploy.system.progress import say

ALL, CHOSEN, NONE = "every quantizer", "chosen", "16 bits"


@dataclass(frozen=True)
class Decision:
    """What became of one quantizer, and why.

    Attributes:
        quantizer: name of its QuantizeLinear.
        products: names of the layers that read it.
        macs: their multiplications for one sample.
        int8_ms: their time behind the quantizer, the quantizing included where it has a kernel of its own.
        float_ms: their time without it.
        saved_ms: what int8 saves in the whole engine: the family's saving, shared out by multiplications.
        alone_db: SQNR of the prediction if this were the only quantizer, median over rows.
        int8: whether it was kept.
        why: the reason.
    """

    quantizer: str
    products: tuple[str, ...]
    macs: int
    int8_ms: float
    float_ms: float
    saved_ms: float
    alone_db: float
    int8: bool
    why: str


@dataclass(frozen=True)
class Placement:
    """The outcome.

    Attributes:
        graph: path of the graph to build.
        floats: names of the quantizers that were taken out.
        decisions: one for each quantizer.
        engines: what was built and measured on the way: ``ms`` and ``sqnr_db``.
        taken: which of them won.
    """

    graph: Path
    floats: tuple[str, ...]
    decisions: tuple[Decision, ...]
    engines: Mapping[str, Mapping[str, float]]
    taken: str

    def to_json(self) -> dict[str, Any]:
        """What ``measured`` of a manifest holds of it."""
        return {
            "taken": self.taken,
            "engines": {name: dict(told) for name, told in self.engines.items()},
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def tell(self) -> None:
        """Say what was measured, how much stays in int8, and with ``-v`` the reason of each decision."""
        for name, told in self.engines.items():
            mark = " (taken)" if name == self.taken else ""
            say(f"  {name}: {told['ms']:.2f} ms, {told['sqnr_db']:.1f} dB{mark}")
        total = sum(decision.macs for decision in self.decisions)
        int8 = [decision for decision in self.decisions if decision.int8]
        share = sum(decision.macs for decision in int8) / total
        say(
            f"{len(int8)} of {len(self.decisions)} quantizers stay, with {share:.0%} of their multiplications"
        )
        for decision in self.decisions:
            say(f"  {decision.quantizer}: {'int8' if decision.int8 else '16 bits'}, {decision.why}", level=2)


def reason(stays: bool, chosen: bool, saved: float, taken: str) -> str:
    """Why a quantizer stays or goes.

    Args:
        stays: whether it stays.
        chosen: whether the search would keep it.
        saved: what int8 saves there, in ms.
        taken: the engine that won.
    """
    told = f"int8 {'saves' if saved > 0 else 'costs'} {abs(saved):.3f} ms"
    if taken == NONE:
        return f"{told}, and the engine without any quantizer is no slower and more exact"
    if taken == ALL and not chosen:
        return f"{told}, and the engine with every quantizer is no slower and more exact"
    if stays:
        return told
    return f"its error weighs more than the {saved:.3f} ms that int8 saves" if saved > 0 else told
