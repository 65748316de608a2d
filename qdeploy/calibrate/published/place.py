"""Grids and codes of a published checkpoint put into the quantizers of a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibrate.published.fit import Fitted, FittedLayer, codes_of
from qdeploy.calibrate.published.layouts import InputGrid
from qdeploy.network.current_timestep import midpoints
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.layer import QuantizedLayer, is_pointwise, quantized_layers
from qdeploy.quant.log_attention import LogQuantizer
from qdeploy.quant.operators import code_type, per_channel
from qdeploy.quant.patches import AXES, PIXELS, ROWS
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.quant.ranges import to_scale
from qdeploy.quant.state import quantizers
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import CapabilityError

INT8 = 127  # how far engines' codes reach
FEATURES, TOKENS = "features", "tokens"


@dataclass(frozen=True)
class PublishedSteps:
    """Which timesteps a file's scales belong to.

    Attributes:
        timesteps: [K] descending, one for each entry; empty where there is but one.
        upwards: whether an entry also serves the timesteps below its own, down to the next one's, as in QuEST;
            else each timestep takes the nearest.
        merged: layers outside of the time path get one range that holds those of all timesteps.
    """

    timesteps: Tensor
    upwards: bool = False
    merged: bool = False

    @property
    def edges(self) -> Tensor:
        """[K - 1], ascending, as `ActivationQuantizer.set` takes them."""
        ascending = self.timesteps.float().flip(0)
        return ascending[:-1].clone() if self.upwards else midpoints(ascending)


def place(
    denoiser: nn.Module, fitted: Fitted, steps: PublishedSteps, temporal: set[str], method: str
) -> None:
    """Set scales, zero points and codes of a quantized network from a published checkpoint.

    Args:
        denoiser: the network, its layers quantized and cut as the file's are.
        fitted: the file's content.
        steps: its timesteps.
        temporal: paths of layers that depend on the timestep alone.
        method: whose file it is.

    Raises:
        CapabilityError: a zero point is no code, or scales lie along axes that no quantizer here has.
    """
    for path, layer in quantized_layers(denoiser).items():
        found = fitted.layers[path]
        pairs = zip(layer.weight_pairs(), found.weights, codes_of(found, _weights(layer)), strict=True)
        for (quantizer, _), grid, codes in pairs:
            quantizer.set(grid.delta, grid.zero_point.to(torch.int32))
            quantizer.codes = codes.to(code_type(quantizer.format)).to(layer.device)
        if (
            found.bias is not None
            and layer.bias is not None
            and not torch.equal(found.bias, layer.bias.cpu())
        ):
            layer.tuned_bias = found.bias.float().to(layer.device)
        for part in range(len(layer.input_quantizers)):
            values = _merged(
                found.inputs[part], layer.activation_quantizers[part].format, steps, path in temporal
            )
            _place_input(layer, part, values, steps, found, method, path)
    for path, module in denoiser.named_modules():
        if isinstance(module, AttentionQuantizers):
            _place_operands(module, fitted, steps, path.removesuffix(".attention_quantizers"), method)


def _weights(layer: QuantizedLayer) -> Format:
    number_format = layer.formats[0]
    assert number_format is not None
    return number_format


def _merged(grid: InputGrid, number_format: Format, steps: PublishedSteps, temporal: bool) -> InputGrid:
    if not steps.merged or temporal or len(grid.delta) == 1:
        return grid
    low = ((number_format.qmin - grid.zero_point) * grid.delta).amin(0, keepdim=True)
    high = ((number_format.qmax - grid.zero_point) * grid.delta).amax(0, keepdim=True)
    delta, zero_point = to_scale(low, high, number_format)
    return InputGrid(delta, zero_point.float())


def _along(grid: InputGrid, method: str, image: bool) -> tuple[InputGrid, str | None]:
    """The grid as [K] or [K, A], and what A runs along in the published tensor; None for [K].

    Raises:
        CapabilityError: it has scales along more than one axis.
    """
    shape = grid.delta.shape[1:]
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    steps = len(grid.delta)
    flat = InputGrid(grid.delta.reshape(steps, -1), grid.zero_point.reshape(steps, -1))
    same = all(bool((each == each[:, :1]).all()) for each in (flat.delta, flat.zero_point))
    if same:  # QuEST stores scales of tensors along their channels too
        return InputGrid(flat.delta[:, 0], flat.zero_point[:, 0]), None
    if len(wide) > 1:
        raise CapabilityError("scales along several axes at once have no quantizer here")
    from_last = len(shape) - 1 - wide[0]
    if method == "quest":
        return flat, FEATURES if image or from_last == 0 else TOKENS
    return flat, (PIXELS if image else FEATURES) if from_last == 0 else (ROWS if image else TOKENS)


def _place_input(
    layer: QuantizedLayer,
    part: int,
    grid: InputGrid,
    steps: PublishedSteps,
    found: FittedLayer,
    method: str,
    path: str,
) -> None:
    quantizer = layer.activation_quantizers[part]
    convolution = isinstance(layer.inner, nn.Conv2d)
    values, along = _along(grid, method, convolution)
    if found.tokens_last and along in (FEATURES, TOKENS):
        along = TOKENS if along == FEATURES else FEATURES
    axis = None
    if along in (ROWS, PIXELS) and not (along == ROWS and is_pointwise(layer.inner)):
        values = values if along == PIXELS else _by_position(values, layer)
        quantizer, axis = layer.quantize_patches(part), AXES[str(along)]
    elif along is not None:
        axis = -2 if along == TOKENS else layer.feature_axis
    _set(quantizer, values, steps, axis, path)


def _by_position(grid: InputGrid, layer: QuantizedLayer) -> InputGrid:
    """Rows of the im2col matrix, which the file has channel by channel, position by position."""
    channels = layer.weight.shape[1]
    delta, zero_point = (
        each.view(len(each), channels, -1).transpose(1, 2).flatten(1)
        for each in (grid.delta, grid.zero_point)
    )
    return InputGrid(delta, zero_point)


def _set(
    quantizer: ActivationQuantizer, grid: InputGrid, steps: PublishedSteps, axis: int | None, path: str
) -> None:
    low, high = quantizer.format.qmin, quantizer.format.qmax
    if quantizer.format.symmetric and bool((grid.zero_point != 0).any()):
        raise CapabilityError(
            f"activations have zero points at {path}, which {quantizer.format.name} has not: choose --activations "
            f"uint{quantizer.format.bits} --target simulated, or leave attention in float with --float-attention"
        )
    if bool(((grid.zero_point < low) | (grid.zero_point > high)).any()):
        raise CapabilityError(
            f"a zero point of the input of {path} is no code of {quantizer.format.name}: import the weights alone "
            "with --activations none, and find ranges of activations by a recipe with load-weights"
        )
    delta, zero_point = grid.delta, grid.zero_point.to(torch.int32)
    if len(delta) == 1:
        quantizer.set(delta[0], zero_point[0], None, axis)
    else:
        quantizer.set(delta.flip(0), zero_point.flip(0), steps.edges, axis)


def _place_operands(
    quantizers: AttentionQuantizers, fitted: Fitted, steps: PublishedSteps, path: str, method: str
) -> None:
    attention = fitted.attentions[path]
    width = 1.0
    if attention.scaled:  # q and k were multiplied by d^(-1/4) before: the step of q itself is larger
        width = float(fitted.head_widths[path]) ** 0.25
    for name, quantizer in quantizers.named_children():
        grid = attention.operands.get(name)
        if not isinstance(quantizer, ActivationQuantizer):
            continue
        if grid is None:  # the softmax output of DGQ, whose scale is found while it runs
            quantizers.probabilities = LogQuantizer(quantizer.format.bits, start=path.endswith("attn2"))
            continue
        grid = _merged(grid, quantizer.format, steps, temporal=False)
        values, along = _along(grid, method, image=False)
        if name in ("query", "key"):
            values = InputGrid(values.delta * width, values.zero_point)
        last = TOKENS if attention.scaled else FEATURES  # there tokens are the last axis
        axis = None if along is None else -1 if along == last else -2
        _set(quantizer, values, steps, axis, f"{path}.{name}")


def not_for_engines(denoiser: nn.Module, temporal: set[str]) -> list[str]:
    """Why no engine can run it, apart from reasons that follow from its formats; empty if one can.

    Args:
        denoiser: the network.
        temporal: paths of layers that depend on the timestep alone.
    """
    reasons = []
    wide = [
        name
        for name, quantizer in quantizers(denoiser)
        if isinstance(quantizer, WeightQuantizer) and quantizer.format.bits < 8 and _reach(quantizer) > INT8
    ]
    if wide:
        reasons.append(f"codes of {wide[0]} are further from their zero point than int8 reaches")
    found = [
        quantizer
        for name, quantizer in quantizers(denoiser)
        if isinstance(quantizer, ActivationQuantizer) and name.rpartition(".input.")[0] not in temporal
    ]
    if any(quantizer.axis is not None for quantizer in found):
        reasons.append("activations have scales along channels, tokens or pixels")
    if any(quantizer.banked and not quantizer.hoisted and quantizer.axis is None for quantizer in found):
        reasons.append("activations have a zero point for each timestep")
    if any(isinstance(module, LogQuantizer) for module in denoiser.modules()):
        reasons.append("the softmax output is on a logarithmic scale")
    return reasons


def _reach(quantizer: WeightQuantizer) -> int:
    """The largest distance of a code from its zero point."""
    assert quantizer.codes is not None
    codes = quantizer.codes.to(torch.int32)
    return int((codes - per_channel(quantizer.zero_point, codes.ndim)).abs().max())
