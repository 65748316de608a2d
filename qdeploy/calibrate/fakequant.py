"""Layers that compute as the engine will: integer weights, quantized inputs, float arithmetic between.

A `QuantizedLayer` takes a weighted layer's place in the module tree. It still holds the original weight,
so one network is both the full-precision teacher and the quantized student, switched by `full_precision`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from qdeploy.calibrate.operators import dequantize_codes, fake_quantize, per_channel
from qdeploy.formats import Format


class ActivationQuantizer(nn.Module):
    """Per-tensor quantization of a layer's input, with one scale and one zero point.

    Layers that read the same tensor share one of these.
    """

    scale: Tensor
    zero_point: Tensor
    frozen: Tensor | None

    def __init__(self, number_format: Format) -> None:
        super().__init__()
        self.format = number_format
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("frozen", None)
        self.enabled = True

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store a range; shapes []."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def freeze(self) -> None:
        """Compute with the exported operator from now on."""
        self.frozen = self.zero_point.to(torch.int8 if self.format.symmetric else torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self.frozen is not None:
            traced: Tensor = torch.ops.qdeploy.quantize_dequantize(x, self.scale, self.frozen)
            return traced
        return fake_quantize(x, self.scale, self.zero_point, self.format.qmin, self.format.qmax)


class WeightQuantizer(nn.Module):
    """Per-output-channel quantization of a weight, or of one part of it along the input channels.

    Attributes:
        scale: [C] steps.
        zero_point: [C] codes of zero.
        codes: integer weights, once rounding is decided; until then None, and the weight is rounded to
            nearest.
        rounding: a module that gives the (soft) weight while rounding is being learned; else None.
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor | None
    frozen: Tensor | None

    def __init__(self, number_format: Format, channels: int) -> None:
        super().__init__()
        self.format = number_format
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("codes", None)
        self.register_buffer("frozen", None)
        self.rounding: nn.Module | None = None

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store ranges; shapes [C]. Codes that were decided on another grid are dropped."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.codes = None

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes of ``weight`` [C, ...] rounded to nearest, in int16 so that every format fits."""
        codes = torch.round(weight / per_channel(self.scale, weight.ndim))
        codes = codes + per_channel(self.zero_point, weight.ndim)
        return codes.clamp(self.format.qmin, self.format.qmax).to(torch.int16)

    def forward(self, weight: Tensor | None) -> Tensor:
        if self.rounding is not None:
            soft: Tensor = self.rounding()
            return soft
        if self.frozen is not None:
            traced: Tensor = torch.ops.qdeploy.dequantize(self.frozen, self.scale)
            return traced
        if self.codes is None:
            assert weight is not None
            return dequantize_codes(self.nearest(weight), self.scale, self.zero_point)
        return dequantize_codes(self.codes, self.scale, self.zero_point)

    def freeze(self) -> None:
        """Compute with the exported operator from now on.

        Its codes are ``codes - zero_point`` in int8: the same weights for an int8 kernel, bit for bit.
        """
        assert self.codes is not None
        self.frozen = (self.codes - per_channel(self.zero_point, self.codes.ndim)).to(torch.int8)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with quantized weight and input.

    Args:
        inner: the layer.
        weights: weight format, or None.
        activations: input format, or None.
        split: channels of the two parts, if the layer reads a concatenation and quantizes both halves
            on their own (Q-Diffusion, section 3.3.2); else empty.
    """

    def __init__(
        self,
        inner: nn.Module,
        weights: Format | None,
        activations: Format | None,
        split: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.inner = inner
        self.split = split
        parts = max(1, len(split))
        channels = len(self.weight)
        self.weight_quantizers = nn.ModuleList(
            [WeightQuantizer(weights, channels) for _ in range(parts)] if weights else []
        )
        self.input_quantizers = nn.ModuleList(
            [ActivationQuantizer(activations) for _ in range(parts)] if activations else []
        )
        self.quantized = True

    @property
    def weight(self) -> Tensor:
        """The original weight."""
        return cast(Tensor, self.inner.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which stays in float."""
        return cast("Tensor | None", self.inner.bias)

    @property
    def feature_axis(self) -> int:
        """The axis of the input that holds its channels."""
        return -1 if isinstance(self.inner, nn.Linear) else 1

    def weight_parts(self) -> list[Tensor]:
        """The original weight, cut along its input channels as the quantizers see it."""
        return list(self.weight.split(self.split, dim=1)) if self.split else [self.weight]

    def weight_pairs(self) -> list[tuple[WeightQuantizer, Tensor]]:
        """Each weight quantizer with the original weight that it quantizes."""
        quantizers = cast("list[WeightQuantizer]", list(self.weight_quantizers))
        return list(zip(quantizers, self.weight_parts(), strict=True)) if quantizers else []

    def input_parts(self, x: Tensor) -> list[Tensor]:
        """The input, cut along its channels as the quantizers see it."""
        return list(x.split(self.split, dim=self.feature_axis)) if self.split else [x]

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            plain: Tensor = self.inner(x)
            return plain
        inputs = self.input_parts(x)
        if self.input_quantizers:
            inputs = [quantizer(part) for quantizer, part in zip(self.input_quantizers, inputs, strict=True)]
        weights = self.quantized_weights()
        output = self._operate(inputs[0], weights[0], self.bias)
        for part, weight in zip(inputs[1:], weights[1:], strict=True):
            output = output + self._operate(part, weight, None)
        return output

    def quantized_weights(self) -> list[Tensor]:
        """The weight of each part as the engine will see it."""
        if not self.weight_quantizers:
            return self.weight_parts()
        if self.inner.weight is None:
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


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` into the module tree at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def freeze(denoiser: nn.Module) -> None:
    """Switch every quantizer to the operators that export writes; for a network that is only traced.

    Shared quantizers are copied, since a tracer calls a shared tensor by any of its names. The exported
    graph shares them again, under the first name.
    """
    for layer in quantized_layers(denoiser).values():
        layer.input_quantizers = deepcopy(layer.input_quantizers)
    for module in denoiser.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.freeze()


def full_precision(denoiser: nn.Module) -> AbstractContextManager[None]:
    """Within, the network computes exactly as it did before it was quantized."""
    return _switched_off([m for m in denoiser.modules() if hasattr(m, "quantized")], "quantized")


def weights_only(denoiser: nn.Module) -> AbstractContextManager[None]:
    """Within, weights are quantized and activations are not."""
    return _switched_off([m for m in denoiser.modules() if isinstance(m, ActivationQuantizer)], "enabled")


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
