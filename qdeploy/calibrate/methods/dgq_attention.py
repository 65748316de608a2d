"""DGQ's attention: softmax outputs on a logarithmic scale, simulated (arXiv 2501.04304)."""

from __future__ import annotations

from qdeploy.calibrate.input_groups import activation_format
from qdeploy.calibrate.session import Session
from qdeploy.network.roles import Layer
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.log_attention import LogQuantizer
from qdeploy.recipe.stages import ACTIVATION_SCALES, Stage
from qdeploy.system.errors import UsageError


def log_attention(session: Session, *, start_token: bool = True) -> None:
    """Quantize softmax outputs on a logarithmic scale, as wide as activations.

    Args:
        session: the calibration.
        start_token: in cross-attention, leave the first key and its probabilities as they are.

    Raises:
        UsageError: the coverage quantizes no attention.
    """
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
            start = start_token and crosses(session.structure.layers, path)
            quantizers.probabilities = LogQuantizer(number_format.bits, start)

    session.once("attention", compute)


def crosses(layers: tuple[Layer, ...], attention: str) -> bool:
    """Whether keys come from another tensor than queries: its layers then read three tensors and not two."""
    return len({layer.reads for layer in layers if layer.path.startswith(f"{attention}.")}) > 2


STAGES = (
    Stage(
        "log-attention",
        log_attention,
        "softmax outputs as powers of two below the sample's largest, the start token as it is",
        lambda options, units, effort: (0, 0),
        paper="DGQ, arXiv 2501.04304",
        spoils=(ACTIVATION_SCALES,),
        simulated=lambda options: "no engine multiplies logarithmic codes",
    ),
)
