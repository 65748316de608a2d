"""Smoothing: the channels of a layer's input are divided by factors that its weight is multiplied with.

Nothing changes but what quantization makes of it (SmoothQuant, arXiv 2211.10438, equation 3): one scale for
the whole input serves channels of like ranges better. The factors of the weight's input channels widen the
range of its output channels, whose scales share them. Stages only choose the factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.shared_inputs import by_tensor

if TYPE_CHECKING:
    from qdeploy.calibrate.session import Session

# Factors further from their mean than this are cut; channels of trained networks differ by as much.
FLOOR = 1e-9


def can_smooth(layer: QuantizedLayer) -> bool:
    """Whether a weight has an axis of input channels: those of grouped convolutions have several."""
    return int(getattr(layer.inner, "groups", 1)) == 1


def input_groups(session: Session) -> list[list[QuantizedLayer]]:
    """Layers that read one tensor, and so share what is done to it, together."""
    return [list(readers.values()) for readers in by_tensor(session.denoiser, session.layers)]


def smoothing_groups(session: Session, linear: bool) -> list[list[QuantizedLayer]]:
    """Those groups of layers that read one tensor which can be smoothed; ``linear``: without convolutions."""
    return [
        group
        for group in input_groups(session)
        if all(can_smooth(layer) and (isinstance(layer.inner, nn.Linear) or not linear) for layer in group)
    ]


def smooth(layer: QuantizedLayer, factors: Tensor) -> None:
    """Smooth a layer, on top of what has been smoothed already.

    Args:
        layer: before any scale of it was found.
        factors: [C] positive. Only their ratios matter, so their geometric mean becomes 1.
    """
    factors = relative_factors(factors)
    if layer.smoothing is not None:
        factors = layer.smoothing * factors
    layer.smoothing = factors.to(layer.device, torch.float32)


def relative_factors(factors: Tensor) -> Tensor:
    """Factors over their geometric mean, within [FLOOR, 1 / FLOOR]: positive and finite."""
    finite = torch.nan_to_num(factors.double(), nan=1.0, posinf=torch.finfo(torch.float32).max)
    logs = finite.clamp(min=torch.finfo(torch.float32).tiny).log()
    return (logs - logs.mean()).exp().clamp(FLOOR, 1 / FLOOR).to(factors.dtype)
