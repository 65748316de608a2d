"""Activations that the runtime itself rounds to int8, call by call: no scale is calibrated.

OpenVINO (``DYNAMIC_QUANTIZATION_GROUP_SIZE``) and ONNX Runtime (``MatMulNBits`` at accuracy level 4) divide the
features of every token into groups and quantize each group symmetrically with the scale ``max|x| / 127``, rounding
half to even. The graph says nothing of it; the simulation here computes the same numbers.
"""

from __future__ import annotations

from torch import Tensor, nn

from qdeploy.quant.operators import round_through
from qdeploy.recipe.formats import Format


class DynamicQuantizer(nn.Module):
    """Rounds a layer's input in groups of features, each with a scale of its own.

    Args:
        number_format: a dynamic format.
        group: features that share a scale; it has to divide the features of every input.
    """

    def __init__(self, number_format: Format, group: int) -> None:
        super().__init__()
        self.format, self.group = number_format, group
        self.enabled = True

    def freeze(self) -> None:
        """Leave the rounding to the runtime from now on."""
        self.enabled = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., features] on the grids of its groups; a group of zeros stays zero."""
        if not self.enabled:
            return x
        grouped = x.unflatten(-1, (-1, self.group))
        largest = grouped.detach().abs().amax(-1, keepdim=True)
        scale = largest.where(largest > 0, 1.0) / self.format.qmax
        rounded: Tensor = (round_through(grouped / scale) * scale).flatten(-2)
        return rounded
