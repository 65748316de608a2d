"""Second moments of what layers read, streamed over calibration rows: of convolutions and of products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.quant.layer import QuantizedLayer

BLOCK = 256  # rows of second moments that are summed up at once, from the diagonal on


def columns_of(layer: QuantizedLayer) -> tuple[int, int]:
    """Groups of a layer's channels, and how many numbers each of their outputs is a product of."""
    groups = layer.inner.groups if isinstance(layer.inner, nn.Conv2d) else 1
    return groups, layer.weight[0].numel()


def read_vectors(layer: QuantizedLayer, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Some of the vectors that a layer multiplies its weight with (im2col), as the weight quantizers see them.

    Args:
        layer: a linear layer, or a convolution, in groups or not.
        x: its input.
        most: how many vectors, at most; they are drawn at random without repetition.
        generator: draws them.

    Returns:
        [groups, N, K], the K numbers in the order of the parts of the weight, each as ``weight.flatten(1)``.
    """
    x = torch.cat(layer.input_parts(x), layer.feature_axis)
    if isinstance(layer.inner, nn.Linear):
        x = x.flatten(0, -2)
        return x[_drawn(len(x), most, generator).to(x.device)][None]
    assert isinstance(layer.inner, nn.Conv2d)
    if layer.shift is None:  # else the quantizer of the input pads it
        mode = "constant" if layer.inner.padding_mode == "zeros" else layer.inner.padding_mode
        x = nn.functional.pad(x, layer.inner._reversed_padding_repeated_twice, mode)
    first, offsets = _windows(layer.inner, x.shape)
    chosen = first[_drawn(len(first), most, generator)][:, None] + offsets
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # channels together, which are copied at once
    vectors = pixels[chosen.flatten().to(x.device)].view(*chosen.shape, -1)  # [N, h w, C]
    return vectors.transpose(1, 2).reshape(len(chosen), layer.inner.groups, -1).transpose(0, 1)


def _drawn(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most] if most < count else torch.arange(count)


def _windows(inner: nn.Conv2d, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """What the kernel covers of padded inputs [B, C, H, W], as numbers of pixels counted over [B, H, W].

    Returns:
        The first pixel of each window; and how far after it the others are, [h w] row by row.
    """
    images, _, height, width = shape
    sizes, strides, dilations = inner.kernel_size, inner.stride, inner.dilation
    starts, steps = [], []
    for extent, size, stride, dilation in zip((height, width), sizes, strides, dilations, strict=True):
        starts.append(torch.arange(0, extent - dilation * (size - 1), stride))
        steps.append(dilation * torch.arange(size))
    first = height * width * torch.arange(images)[:, None, None] + width * starts[0][:, None] + starts[1]
    return first.flatten(), (width * steps[0][:, None] + steps[1]).flatten()


class Moments:
    """Moments of a layer's inputs, summed up batch by batch.

    Args:
        layer: whose; says the sizes and the device.
        compared: whether each vector comes with the one that should be in its place.

    Attributes:
        count: vectors that were seen.
        square: [groups, K, K] sum of ``x x^T``; above the blocks on its diagonal, since it is symmetric.
        total: [groups, K] sum of x.
        weight: [groups, O, K] W of the layer, if vectors are compared; else None.
        gap_square: sum of ``(x' - x) x^T``, x' what should be in the place of x: [groups, K, K], or times W
            [groups, O, K] where that takes less work.
        gap_total: [groups, K] sum of ``x' - x``.
    """

    def __init__(self, layer: QuantizedLayer, compared: bool = False) -> None:
        groups, columns = columns_of(layer)
        self.count = 0
        self.square = torch.zeros(groups, columns, columns, device=layer.device)
        self.total = torch.zeros(groups, columns, device=layer.device)
        self.weight: Tensor | None = None
        if compared:
            weight = torch.cat([part for _, part in layer.weight_pairs()], 1)
            self.weight = weight.detach().float().reshape(groups, -1, columns)
            self.weighted = 2 * self.weight.shape[1] < columns
            self.gap_square = torch.zeros_like(self.weight if self.weighted else self.square)
            self.gap_total = torch.zeros_like(self.total)

    def add(self, x: Tensor, wanted: Tensor | None = None) -> None:
        """Take vectors [groups, N, K] into account; ``wanted`` are those that should be in their places."""
        x = x.detach().float()
        self.count += x.shape[1]
        for first in range(0, x.shape[2], BLOCK):
            block = slice(first, first + BLOCK)
            self.square[:, block, first:].baddbmm_(x[:, :, block].transpose(1, 2), x[:, :, first:])
        self.total += x.sum(1)
        if self.weight is not None and wanted is not None:
            gap = wanted.detach().float() - x
            self.gap_total += gap.sum(1)
            left = gap @ self.weight.transpose(1, 2) if self.weighted else gap
            self.gap_square.baddbmm_(left.transpose(1, 2), x)

    @property
    def mean(self) -> Tensor:
        """[groups, K] mean of the vectors."""
        return self.total / max(1, self.count)

    @property
    def gap(self) -> Tensor | None:
        """[groups, K] mean of ``x' - x``."""
        return None if self.weight is None else self.gap_total / max(1, self.count)

    def hessian(self, centred: bool) -> Tensor:
        """[groups, K, K] mean of ``x x^T``; with ``centred``, of what is left of x without its mean."""
        hessian = self.square.triu().div_(max(1, self.count))
        hessian += hessian.triu(1).transpose(1, 2)
        if centred:
            hessian.baddbmm_(self.mean[:, :, None], self.mean[:, None, :], alpha=-1)
        return hessian

    def missed(self, centred: bool) -> Tensor | None:
        """[groups, O, K] ``W`` times the mean of ``(x' - x) x^T``; with ``centred``, of both without their means."""
        if self.weight is None or (gap := self.gap) is None:
            return None
        mean = self.gap_square / max(1, self.count)
        missed = mean if self.weighted else self.weight @ mean
        return missed - (self.weight @ gap[:, :, None]) * self.mean[:, None, :] if centred else missed
