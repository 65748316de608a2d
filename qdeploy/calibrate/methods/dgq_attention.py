"""DGQ's attention: softmax outputs on a logarithmic scale, simulated (arXiv 2501.04304)."""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.calibrate.input_groups import activation_format
from qdeploy.calibrate.session import Session
from qdeploy.network.roles import Layer
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.log_attention import LogQuantizer
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ACTIVATION_SCALES, Stage
from qdeploy.system.errors import UsageError


@dataclass(frozen=True)
class LogAttention(Stage):
    """Quantize softmax outputs on a logarithmic scale, as wide as activations.

    Running it raises `UsageError` where the coverage quantizes no attention.

    Attributes:
        start_token: in cross-attention, leave the first key and its probabilities as they are.
    """

    name = "log-attention"
    description = "softmax outputs as powers of two below the sample's largest, the start token as it is"
    paper = "DGQ, arXiv 2501.04304"
    spoils = (ACTIVATION_SCALES,)

    start_token: bool = True

    def run(self, session: Session) -> None:
        """Replace the quantizers of softmax outputs."""
        number_format = activation_format(session, "log-attention")
        found = {
            path: module
            for path in session.structure.attentions
            for module in session.denoiser.get_submodule(path).children()
            if isinstance(module, AttentionQuantizers)
        }
        if session.structure.attentions and not found:
            raise UsageError(
                f"the coverage {session.recipe.coverage} quantizes no attention products: choose --coverage dgq-paper"
            )

        def compute() -> None:
            for path, quantizers in found.items():
                start = self.start_token and crosses(session.structure.layers, path)
                quantizers.probabilities = LogQuantizer(number_format.bits, start)

        session.once("attention", compute)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        return 0, 0

    def simulated(self) -> str:
        """Why no engine can run the result."""
        return "no engine multiplies logarithmic codes"


def crosses(layers: tuple[Layer, ...], attention: str) -> bool:
    """Whether keys come from another tensor than queries: its layers then read three tensors and not two."""
    return len({layer.reads for layer in layers if layer.path.startswith(f"{attention}.")}) > 2
