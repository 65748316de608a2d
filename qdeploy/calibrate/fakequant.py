"""Layers that compute as the engine will: integer weights, quantized inputs, float arithmetic between.

A `QuantizedLayer` takes a weighted layer's place in the module tree. It still holds the original weight,
so one network is both the full-precision teacher and the quantized student, switched by `full_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from qdeploy.calibrate.feature_table import FeatureTable
from qdeploy.calibrate.operators import (
    code_type,
    dequantize_codes,
    over_weight,
    to_grid,
)
from qdeploy.clock import Clock, clock_of
from qdeploy.errors import CapabilityError, InvalidInputError
from qdeploy.formats import Format


class ActivationQuantizer(nn.Module):
    """Quantization of a layer's input, with one scale; or one for each group of timesteps; or along an axis.

    Layers that read the same tensor share one of these. Where scales stand outside of a layer's sum (they
    depend on the timestep or on the token) the tensor is multiplied by s0 / s and quantized with one nominal
    scale s0; `restore` multiplies what a layer computes from it by s / s0. That is how an engine computes it
    too, whose scales are constants. Scales along the features stand inside of the sum: they are a simulation.

    Attributes:
        scale: [], or [K] for groups of timesteps, or [A] along an axis, or [K, A].
        zero_point: codes of zero, shaped like ``scale``.
        edges: [K - 1] timesteps between the groups, ascending; empty for one group.
        axis: the input's axis that scales run along; None for one scale per tensor.
        clock: tells the timestep; needed where there are several groups.
    """

    scale: Tensor
    zero_point: Tensor
    edges: Tensor
    frozen: Tensor | None
    nominal: Tensor | None
    to_nominal: Tensor | None
    from_nominal: Tensor | None

    def __init__(self, number_format: Format) -> None:
        super().__init__()
        self.format = number_format
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("edges", torch.zeros(0))
        for name in ("frozen", "nominal", "to_nominal", "from_nominal"):
            self.register_buffer(name, None)
        self.axis: int | None = None
        self.clock: Clock | None = None
        self.enabled = True

    def set(
        self, scale: Tensor, zero_point: Tensor, edges: Tensor | None = None, axis: int | None = None
    ) -> None:
        """Store ranges.

        Args:
            scale: positive; [] or, along an axis, [A]. With edges, one entry for each group in front.
            zero_point: shaped like ``scale``.
            edges: [K - 1]; a single group is stored as if there were none.
            axis: of the input; -1 or 1 for features, -2 for tokens.
        """
        if edges is not None and not len(edges):
            scale, zero_point = scale[0], zero_point[0]
        device = self.scale.device
        self.scale = scale.to(device, torch.float32, copy=True)
        self.zero_point = zero_point.to(device, torch.int32, copy=True)
        self.edges = (torch.zeros(0) if edges is None else edges.float()).to(device)
        self.axis = axis

    @property
    def banked(self) -> bool:
        """Whether there is a scale for each group of timesteps."""
        return len(self.edges) > 0

    @property
    def simple(self) -> bool:
        """Whether there is but one scale."""
        return not self.banked and self.axis is None

    @property
    def hoisted(self) -> bool:
        """Whether scales are taken out of the quantization; a zero point that moves forbids it."""
        return not self.simple and self.format.symmetric and self.axis in (None, -2)

    def freeze(self) -> None:
        """Compute with the exported operators from now on.

        Raises:
            CapabilityError: a zero point depends on the timestep, or scales run along the features.
        """
        stored = code_type(self.format)
        if self.simple:
            self.frozen = self.zero_point.to(stored)
            return
        if not self.hoisted:
            moves = self.axis in (None, -2)
            what = "a zero point that moves" if moves else "a scale for each input channel"
            raise CapabilityError(f"{what} has no place in a static integer kernel: this is a simulation")
        self.frozen = torch.zeros((), dtype=stored, device=self.scale.device)
        self.nominal = _nominal(self.scale)
        self.to_nominal, self.from_nominal = self.nominal / self.scale, self.scale / self.nominal

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        scale, zero_point = self.scale, self.zero_point
        if self.hoisted:
            nominal = _nominal(scale) if self.nominal is None else self.nominal
            x = x * self._over(nominal / scale if self.to_nominal is None else self.to_nominal, x)
            scale, zero_point = nominal, zero_point.new_zeros(())
        elif not self.simple:
            scale, zero_point = self._over(scale, x), self._over(zero_point, x)
        if self.frozen is not None:
            traced: Tensor = torch.ops.qdeploy.quantize_dequantize(x, scale, self.frozen)
            return traced
        return to_grid(x, scale, zero_point, self.format)

    def restore(self, y: Tensor) -> Tensor:
        """What is linear in this quantizer's output, back in the scales of its rows."""
        if not self.enabled or not self.hoisted:
            return y
        factor = self.scale / _nominal(self.scale) if self.from_nominal is None else self.from_nominal
        return y * self._over(factor, y)

    def _over(self, values: Tensor, x: Tensor) -> Tensor:
        """Entries of the running timesteps, shaped so that they broadcast over ``x`` [B, ...]."""
        shape = [1] * x.ndim
        if self.axis is not None:
            if x.shape[self.axis] != values.shape[-1]:
                raise InvalidInputError(
                    f"scales were calibrated for {values.shape[-1]} "
                    f"{'tokens' if self.axis == -2 else 'channels'}, not {x.shape[self.axis]}"
                )
            shape[self.axis] = values.shape[-1]
        if not self.banked:
            return values.view(shape)
        assert self.clock is not None, "scales that depend on the timestep need a clock"
        shape[0] = -1
        chosen = values.view(shape).index_select(0, self.clock.index(self.edges))
        if len(chosen) > 1 and len(chosen) != len(x):  # rows that were folded into the first axis, in order
            chosen = chosen.repeat_interleave(len(x) // len(chosen), 0)
        return chosen


def _nominal(scale: Tensor) -> Tensor:
    """The constant scale s0 of a bank: its geometric mean, so that ratios stay near 1."""
    return scale.detach().log().mean().exp()


class WeightQuantizer(nn.Module):
    """Quantization of a weight, or of one part of it along the input channels.

    Args:
        number_format: the grid.
        channels: of the output.
        features: of the input; needed where the format has blocks.

    Attributes:
        scale: [C] steps per output channel; [C, blocks] where blocks of input features have their own.
        zero_point: codes of zero, shaped like ``scale``.
        codes: quantized weights, once rounding is decided; until then None, and the weight is rounded to
            nearest.
        rounding: a module that gives the (soft) weight while rounding is being learned; else None.
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor | None
    frozen: Tensor | None

    def __init__(self, number_format: Format, channels: int, features: int = 0) -> None:
        super().__init__()
        self.format = number_format
        shape = (channels, features // number_format.block) if number_format.block else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("codes", None)
        self.register_buffer("frozen", None)
        self.rounding: nn.Module | None = None

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store ranges, shaped as they are. Codes that were decided on another grid are dropped."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.codes = None

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes of ``weight`` [C, ...] rounded to nearest; integers in int16, so that every format fits."""
        steps, low, high = weight / over_weight(self.scale, weight.shape), self.format.qmin, self.format.qmax
        if self.format.floating:
            return steps.clamp(low, high).to(code_type(self.format))
        codes = torch.round(steps) + over_weight(self.zero_point, weight.shape)
        return codes.clamp(low, high).to(torch.int16)

    def forward(self, weight: Tensor | None) -> Tensor:
        if self.rounding is not None:
            soft: Tensor = self.rounding()
            return soft
        if self.frozen is not None:
            traced: Tensor
            if self.format.block:
                traced = torch.ops.qdeploy.dequantize_blocks(self.frozen, self.scale, self.format.block)
            else:
                traced = torch.ops.qdeploy.dequantize(self.frozen, self.scale)
            return traced
        if self.codes is None:
            assert weight is not None
            return dequantize_codes(self.nearest(weight), self.scale, self.zero_point)
        return dequantize_codes(self.codes, self.scale, self.zero_point)

    def freeze(self) -> None:
        """Compute with the exported operator from now on.

        Integers become ``codes - zero_point`` in int8: the same weights for an int8 kernel, bit for bit.
        """
        assert self.codes is not None
        if self.format.floating:
            self.frozen = self.codes.clone()
        else:
            self.frozen = (self.codes - over_weight(self.zero_point, self.codes.shape)).to(torch.int8)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with quantized weight and input.

    Args:
        inner: the layer.
        weights: weight format, or None.
        activations: input format, or None.
        split: channels of the two parts, if the layer reads a concatenation and quantizes both halves
            on their own (Q-Diffusion, section 3.3.2); else empty.

    Attributes:
        smoothing: [C] positive factors of the input channels: the input is divided by them, the weight
            multiplied. Without quantization nothing changes (SmoothQuant, Xiao et al. 2023, equation 3).
        tuned: the weight that is quantized in place of the original, if a stage has tuned it.
        tuned_bias: likewise.
        order: [C] the input channels in the order in which ``split`` cuts them; None for their own.
        table: what the layer looks up instead of computing, if it is a temporal feature.
    """

    smoothing: Tensor | None
    tuned: Tensor | None
    tuned_bias: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        inner: nn.Module,
        weights: Format | None,
        activations: Format | None,
        split: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.inner = inner
        self.formats = (weights, activations)
        self.channels, self.features = self.weight.shape[:2]
        for name in ("smoothing", "tuned", "tuned_bias", "order"):
            self.register_buffer(name, None)
        self.table: FeatureTable | None = None
        self.quantized = True
        self.cut(split)

    def cut(self, split: tuple[int, ...], order: Tensor | None = None) -> None:
        """Quantize parts of the input channels on their own, with new quantizers.

        Args:
            split: channels of the parts; empty for one part.
            order: [C] which channels they are; None for their own order.
        """
        weights, activations = self.formats
        parts = max(1, len(split))
        clock = next((quantizer.clock for quantizer in getattr(self, "input_quantizers", ())), None)
        self.split, self.order = split, order
        self.weight_quantizers = nn.ModuleList(
            [self._weight_quantizer(weights, features) for features in split or (self.features,)]
            if weights
            else []
        )
        self.input_quantizers = nn.ModuleList(
            [ActivationQuantizer(activations) for _ in range(parts)] if activations else []
        )
        for quantizer in self.activation_quantizers:
            quantizer.clock = clock
        self.weight_quantizers.to(self.device)
        self.input_quantizers.to(self.device)

    def _weight_quantizer(self, number_format: Format, features: int) -> WeightQuantizer:
        fitting = number_format.fitting(features)
        if fitting is None:
            raise CapabilityError(f"{number_format.name} has no block that divides {features} input features")
        return WeightQuantizer(fitting, self.channels, features)

    @property
    def weight(self) -> Tensor:
        """The original weight."""
        return cast(Tensor, self.inner.weight)

    @property
    def student(self) -> Tensor:
        """The weight that is quantized: as tuned, and smoothed."""
        weight = self.weight if self.tuned is None else self.tuned
        if self.smoothing is None:
            return weight
        return weight * self.smoothing.view(1, -1, *[1] * (weight.ndim - 2))

    @property
    def bias(self) -> Tensor | None:
        """The bias, which stays in float."""
        return cast("Tensor | None", self.inner.bias) if self.tuned_bias is None else self.tuned_bias

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    @property
    def feature_axis(self) -> int:
        """The axis of the input that holds its channels."""
        return -1 if isinstance(self.inner, nn.Linear) else 1

    def weight_parts(self) -> list[Tensor]:
        """The weight, cut along its input channels as the quantizers see it."""
        weight = self.student if self.order is None else self.student.index_select(1, self.order)
        return list(weight.split(self.split, dim=1)) if self.split else [weight]

    def weight_pairs(self) -> list[tuple[WeightQuantizer, Tensor]]:
        """Each weight quantizer with the weight that it quantizes."""
        quantizers = cast("list[WeightQuantizer]", list(self.weight_quantizers))
        return list(zip(quantizers, self.weight_parts(), strict=True)) if quantizers else []

    @property
    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """The input quantizers, typed."""
        return cast("list[ActivationQuantizer]", list(self.input_quantizers))

    def input_parts(self, x: Tensor) -> list[Tensor]:
        """The input, smoothed and cut along its channels as the quantizers see it."""
        if self.smoothing is not None:
            x = x * per_feature(1 / self.smoothing, x, self.feature_axis)
        if self.order is not None:
            x = x.index_select(self.feature_axis, self.order)
        return list(x.split(self.split, dim=self.feature_axis)) if self.split else [x]

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            plain: Tensor = self.inner(x)
            return plain
        if self.table is not None:
            looked_up: Tensor = self.table()
            return looked_up
        quantizers = self.activation_quantizers
        parts = zip(self.input_parts(x), self.quantized_weights(), strict=True)
        if not any(quantizer.hoisted for quantizer in quantizers):
            outputs = []
            for number, (part, weight) in enumerate(parts):
                seen = quantizers[number](part) if quantizers else part
                outputs.append(self._operate(seen, weight, None if number else self.bias))
        else:
            # The factor of the timestep stands between the product and the bias.
            bias, outputs = self.bias, []
            for quantizer, (part, weight) in zip(quantizers, parts, strict=True):
                product = quantizer.restore(self._operate(quantizer(part), weight, None))
                if bias is not None:
                    product, bias = product + per_feature(bias, product, self.feature_axis), None
                outputs.append(product)
        return functools.reduce(torch.add, outputs)

    def quantized_weights(self) -> list[Tensor]:
        """The weight of each part as the engine will see it."""
        if not self.weight_quantizers:
            return self.weight_parts()
        quantizers = cast("list[WeightQuantizer]", list(self.weight_quantizers))
        decided = (quantizer.codes is not None or quantizer.rounding is not None for quantizer in quantizers)
        if self.inner.weight is None or all(decided):
            return [quantizer(None) for quantizer in self.weight_quantizers]
        parts = zip(self.weight_quantizers, self.weight_parts(), strict=True)
        return [quantizer(weight) for quantizer, weight in parts]

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.inner, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        output: Tensor = cast(nn.Conv2d, self.inner)._conv_forward(x, weight, bias)
        return output


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a network by path, in module order."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedLayer)}


def per_feature(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Reshape one value per feature so that it broadcasts over ``like``, whose features are on ``axis``."""
    return values if axis == -1 else values.view(-1, *[1] * (like.ndim - 2))


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` into the module tree at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def freeze(denoiser: nn.Module) -> None:
    """Switch every quantizer to the operators that export writes; for a network that is only traced.

    An engine has one timestep for all rows, so the clock then looks at the first only.

    Shared quantizers are copied, since a tracer calls a shared tensor by any of its names. The exported
    graph shares them again, under the first name.
    """
    for layer in quantized_layers(denoiser).values():
        layer.input_quantizers = deepcopy(layer.input_quantizers)
    clock = clock_of(denoiser)
    if clock is not None:
        clock.single = True
    for module in denoiser.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.freeze()


def full_precision(denoiser: nn.Module) -> AbstractContextManager[None]:
    """Within, the network computes exactly as it did before it was quantized."""
    return _switched_off([m for m in denoiser.modules() if hasattr(m, "quantized")], "quantized")


def weights_only(denoiser: nn.Module) -> AbstractContextManager[None]:
    """Within, weights are quantized and activations are not."""
    return _switched_off([m for m in denoiser.modules() if hasattr(m, "enabled")], "enabled")


@contextmanager
def _switched_off(modules: Sequence[nn.Module], switch: str) -> Iterator[None]:
    """Within, the attribute ``switch`` of every module is False; afterwards it is what it was."""
    before = [getattr(module, switch) for module in modules]
    for module in modules:
        setattr(module, switch, False)
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, switch, value)
