"""The result of a placement: what was decided for each quantizer, with the measurements behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdeploy.system.progress import say

ALL, CHOSEN, NONE = "every quantizer", "chosen", "16 bits"


@dataclass(frozen=True)
class Decision:
    """The decision about one quantizer, and the reason.

    Attributes:
        quantizer: name of its QuantizeLinear.
        products: names of the layers that read it.
        macs: their multiplications for one sample.
        int8_ms: their time behind the quantizer, the quantizing included where it has a kernel of its own.
        float_ms: their time without it.
        saved_ms: what int8 saves in the whole engine: the saving of its group of like layers, divided by MACs.
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
        """The entry in the ``measured`` part of a manifest."""
        return {
            "taken": self.taken,
            "engines": {name: dict(measured) for name, measured in self.engines.items()},
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def log(self) -> None:
        """Print what was measured, how much stays in int8, and with ``-v`` the reason of each decision."""
        for name, measured in self.engines.items():
            mark = " (taken)" if name == self.taken else ""
            say(f"  {name}: {measured['ms']:.2f} ms, {measured['sqnr_db']:.1f} dB{mark}")
        total = sum(decision.macs for decision in self.decisions)
        int8 = [decision for decision in self.decisions if decision.int8]
        share = sum(decision.macs for decision in int8) / total
        say(
            f"{len(int8)} of {len(self.decisions)} quantizers stay, with {share:.0%} of their multiplications"
        )
        for decision in self.decisions:
            say(f"  {decision.quantizer}: {'int8' if decision.int8 else '16 bits'}, {decision.why}", level=2)


def reason(stays: bool, chosen: bool, saved: float, taken: str) -> str:
    """Why a quantizer is kept or removed.

    Args:
        stays: whether it is kept.
        chosen: whether the search would keep it.
        saved: what int8 saves there, in ms.
        taken: the engine that won.
    """
    saving = f"int8 {'saves' if saved > 0 else 'costs'} {abs(saved):.3f} ms"
    if taken == NONE:
        return f"{saving}, and the engine without any quantizer is no slower and more exact"
    if taken == ALL and not chosen:
        return f"{saving}, and the engine with every quantizer is no slower and more exact"
    if stays:
        return saving
    return f"its error weighs more than the {saved:.3f} ms that int8 saves" if saved > 0 else saving
