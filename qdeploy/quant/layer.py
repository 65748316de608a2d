"""Layers that compute as the engine will: integer weights, quantized inputs, float arithmetic between.

A `QuantizedLayer` takes a weighted layer's place in the module tree. It still holds the original weight,
so one network is both the full-precision teacher and the quantized student, switched by
`qdeploy.quant.modes.full_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qdeploy.model.unloaded import weight_of
from qdeploy.network.tracer import WrappedLayer
from qdeploy.quant.basis import low_rank, padded, rotate, shift_bias
from qdeploy.quant.dynamic import DynamicQuantizer
from qdeploy.quant.feature_table import FeatureTable
from qdeploy.quant.patches import PatchQuantizer, convolve
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import CapabilityError

# Tensors that stages may give a layer in addition to its quantizers, by the names of `qdeploy.quant.state`.
OF_LAYERS = ("smoothing", "tuned", "tuned_bias", "order", "rotation", "branch_down", "branch_up", "shift")


class QuantizedLayer(WrappedLayer):
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
        tuned_bias: the bias in place of the original, if a stage has tuned it.
        rotation: [n, n] orthogonal; each block of n channels of the smoothed input and of the weight is multiplied
            by it.
        branch_down: [C, rank]; with ``branch_up`` a part of the smoothed weight that is multiplied in float.
        branch_up: [rank, O].
        shift: [C] what is subtracted from the channels of the input, padding included, as the last in front of the
            quantizers; the bias makes up for it.
        order: [C] the input channels in the order in which ``split`` cuts them; None for their own.
        table: what the layer looks up instead of computing, if it is a temporal feature.
        dynamic: simulates the runtime's own rounding of the input, if nothing is calibrated for it.
    """

    smoothing: Tensor | None
    tuned: Tensor | None
    tuned_bias: Tensor | None
    order: Tensor | None
    rotation: Tensor | None
    branch_down: Tensor | None
    branch_up: Tensor | None
    shift: Tensor | None

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
        self.dynamic: DynamicQuantizer | None = None
        self.bias_holds_shift = False
        self.channels, self.features = cast(Tensor, inner.weight).shape[:2]
        for name in OF_LAYERS:
            self.register_buffer(name, None)
        self.table: FeatureTable | None = None
        self.quantized = True
        self.cut(split)
        if activations is not None and activations.dynamic:
            blocks = [cast(WeightQuantizer, quantizer).format.block for quantizer in self.weight_quantizers]
            self.dynamic = DynamicQuantizer(activations, min(blocks))

    def cut(self, split: tuple[int, ...], order: Tensor | None = None) -> None:
        """Quantize parts of the input channels on their own, with new quantizers.

        Args:
            split: channels of the parts; empty for one part.
            order: [C] which channels they are; None for their own order.
        """
        weights, activations = self.formats
        parts = max(1, len(split))
        current = next(
            (quantizer.current_timestep for quantizer in getattr(self, "input_quantizers", ())), None
        )
        self.split, self.order = split, order
        self.weight_quantizers = nn.ModuleList(
            [self._weight_quantizer(weights, features) for features in split or (self.features,)]
            if weights
            else []
        )
        self.input_quantizers = nn.ModuleList(
            [ActivationQuantizer(activations) for _ in range(parts)]
            if activations and not activations.dynamic
            else []
        )
        for quantizer in self.activation_quantizers:
            quantizer.current_timestep = current
        self.weight_quantizers.to(self.device)
        self.input_quantizers.to(self.device)

    def quantize_patches(self, part: int = 0) -> PatchQuantizer:
        """Quantize the im2col matrix of a part in place of it, for all layers that share the quantizer.

        Returns:
            The quantizer; it has the scale of the one whose place it takes.
        """
        before = self.activation_quantizers[part]
        if isinstance(before, PatchQuantizer):
            return before
        quantizer = PatchQuantizer(before.format).to(self.device)
        quantizer.set(before.scale, before.zero_point, before.edges if before.banked else None)
        quantizer.current_timestep = before.current_timestep
        self.input_quantizers[part] = quantizer
        return quantizer

    def _weight_quantizer(self, number_format: Format, features: int) -> WeightQuantizer:
        fitting = number_format.fitting(features)
        if fitting is None:
            raise CapabilityError(f"{number_format.name} has no block that divides {features} input features")
        return WeightQuantizer(fitting, self.channels, features)

    @property
    def weight(self) -> Tensor:
        """The original weight; empty in a network read from a checkpoint, whose codes are all that is left of it.

        Networks look at its dtype and device (the image projections of Kandinsky, T5's output layers).
        """
        weight = weight_of(self.inner)
        return torch.empty(0, device=self.device) if weight is None else weight

    @property
    def student(self) -> Tensor:
        """The weight that is quantized: as tuned, smoothed, without the branch's part of it, and rotated."""
        weight = self.weight if self.tuned is None else self.tuned
        if self.smoothing is not None:
            weight = weight * self.smoothing.view(1, -1, *[1] * (weight.ndim - 2))
        if self.branch_down is not None and self.branch_up is not None:
            weight = weight - (self.branch_down @ self.branch_up).T.view(weight.shape)
        return weight if self.rotation is None else rotate(weight, self.rotation, 1)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which stays in float."""
        return cast("Tensor | None", self.inner.bias) if self.tuned_bias is None else self.tuned_bias

    @property
    def device(self) -> torch.device:
        """The device of its tensors, except those that are only described."""
        there = (t.device for t in (*self.parameters(), *self.buffers()) if not t.is_meta)
        return next(there, torch.device("cpu"))

    @property
    def feature_axis(self) -> int:
        """The axis of the input that holds its channels."""
        return -1 if isinstance(self.inner, nn.Linear) else 1

    def part_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of `weight_parts`."""
        inner = cast("nn.Linear | nn.Conv1d | nn.Conv2d", self.inner)
        kernel = () if isinstance(inner, nn.Linear) else tuple(inner.kernel_size)
        return [(self.channels, features, *kernel) for features in self.split or (self.features,)]

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

    def smoothed(self, x: Tensor) -> Tensor:
        """The input, its channels divided by their factors."""
        if self.smoothing is None:
            return x
        return x * per_feature(1 / self.smoothing, x, self.feature_axis)

    def input_parts(self, x: Tensor) -> list[Tensor]:
        """The input, smoothed, rotated, shifted and cut along its channels as the quantizers see it."""
        x = self.smoothed(x)
        if self.rotation is not None:
            x = rotate(x, self.rotation, self.feature_axis)
        if self.shift is not None:
            x = padded(x, self.inner) if isinstance(self.inner, nn.Conv2d) else x
            x = x - per_feature(self.shift, x, self.feature_axis)
        if self.order is not None:
            x = x.index_select(self.feature_axis, self.order)
        return list(x.split(self.split, dim=self.feature_axis)) if self.split else [x]

    def forward(self, input: Tensor) -> Tensor:  # as torch's layers call it
        if not self.quantized:
            plain: Tensor = self.inner(input)
            return plain
        if self.table is not None:
            looked_up: Tensor = self.table()
            return looked_up
        quantizers, weights = self.activation_quantizers, self.quantized_weights()
        shifted_bias = self.shifted_bias(weights)
        parts = zip(self.input_parts(input), weights, strict=True)
        if not any(quantizer.hoisted for quantizer in quantizers):
            outputs = []
            for number, (part, weight) in enumerate(parts):
                quantizer = quantizers[number] if quantizers else None
                outputs.append(self._product(quantizer, part, weight, None if number else shifted_bias))
        else:
            # The factor of the timestep is applied between the product and the bias.
            bias, outputs = shifted_bias, []
            for quantizer, (part, weight) in zip(quantizers, parts, strict=True):
                product = quantizer.restore(self.operate(quantizer(part), weight, None))
                if bias is not None:
                    product, bias = product + per_feature(bias, product, self.feature_axis), None
                outputs.append(product)
        if self.branch_down is not None and self.branch_up is not None:
            outputs.append(
                low_rank(self.smoothed(input), self.branch_down, self.branch_up, self.feature_axis)
            )
        return functools.reduce(torch.add, outputs)

    def shifted_bias(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The bias with what the quantized weight computes from the shift.

        Args:
            weights: of `quantized_weights`.
        """
        if self.shift is None or self.bias_holds_shift:
            return self.bias
        shift = self.shift if self.order is None else self.shift[self.order]
        parts = shift.split(self.split) if self.split else [shift]
        pairs = zip(weights, parts, strict=True)
        constant = functools.reduce(torch.add, (shift_bias(weight, part) for weight, part in pairs))
        return constant if self.bias is None else self.bias + constant

    def quantized_weights(self) -> list[Tensor]:
        """The weight of each part as the engine will see it."""
        if not self.weight_quantizers:
            return self.weight_parts()
        quantizers = cast("list[WeightQuantizer]", list(self.weight_quantizers))
        decided = (quantizer.decided for quantizer in quantizers)
        if self.inner.weight is None or all(decided):
            return [quantizer(None) for quantizer in self.weight_quantizers]
        parts = zip(self.weight_quantizers, self.weight_parts(), strict=True)
        return [quantizer(weight) for quantizer, weight in parts]

    def _product(
        self, quantizer: ActivationQuantizer | None, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        if isinstance(quantizer, PatchQuantizer) and quantizer.enabled:
            if self.shift is not None:
                raise CapabilityError("scales within the im2col matrix and shifted inputs do not go together")
            return convolve(cast(nn.Conv2d, self.inner), x, weight, bias, quantizer)
        return self.operate(x if quantizer is None else quantizer(x), weight, bias)

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own operation, on an input and a weight that are quantized already."""
        if isinstance(self.inner, nn.Linear):
            return nn.functional.linear(x if self.dynamic is None else self.dynamic(x), weight, bias)
        if self.formats[0] is not None and self.formats[0].block:  # of one pixel: a product of matrices
            pixels = x.flatten(2).transpose(1, 2)
            pixels = pixels if self.dynamic is None else self.dynamic(pixels)
            product = nn.functional.linear(pixels, weight.flatten(1), bias).transpose(1, 2)
            return cast(Tensor, product.unflatten(2, x.shape[2:]))
        inner = cast(nn.Conv2d, self.inner)
        if self.shift is not None:  # padded before
            return nn.functional.conv2d(x, weight, bias, inner.stride, 0, inner.dilation)
        output: Tensor = inner._conv_forward(x, weight, bias)
        return output


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that computes every pixel from that pixel alone."""
    return isinstance(module, nn.Conv2d) and (
        set(module.kernel_size) == set(module.stride) == {1}
        and module.groups == 1
        and set(module.padding) == {0}
    )


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
