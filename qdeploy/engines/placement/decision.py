"""The result of a placement: what was decided for each quantizer, with the measurements behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qdeploy.store.measured import CandidateMeasured, DecisionMeasured, PlacementMeasured
from qdeploy.system.progress import say

ALL, CHOSEN, NONE = "every quantizer", "chosen", "16 bits"


@dataclass(frozen=True)
class Placement:
    """The outcome.

    Attributes:
        graph: path of the graph to build.
        floats: names of the quantizers that were taken out.
        decisions: one for each quantizer.
        engines: what was built and measured on the way, by name.
        taken: which of them won.
    """

    graph: Path
    floats: tuple[str, ...]
    decisions: tuple[DecisionMeasured, ...]
    engines: Mapping[str, CandidateMeasured]
    taken: str

    @property
    def measured(self) -> PlacementMeasured:
        """The entry in the ``measured`` part of a manifest."""
        return PlacementMeasured(taken=self.taken, engines=dict(self.engines), decisions=list(self.decisions))

    def log(self) -> None:
        """Print what was measured, how much stays in int8, and with ``-v`` the reason of each decision."""
        for name, measured in self.engines.items():
            mark = " (taken)" if name == self.taken else ""
            say(f"  {name}: {measured.ms:.2f} ms, {measured.sqnr_db:.1f} dB{mark}")
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
