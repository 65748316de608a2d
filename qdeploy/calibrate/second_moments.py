"""Second moments of what layers read, streamed over calibration rows: of convolutions and of products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.quant.layer import QuantizedLayer

BLOCK = 1024  # rows of second moments that are summed up at once, from the diagonal on


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
    windows = _windows(layer.inner, x, padded=layer.shift is not None)
    batch, _, height, width = windows.shape[:4]
    drawn = _drawn(batch * height * width, most, generator).to(x.device)
    image, pixel = drawn // (height * width), drawn % (height * width)
    chosen = windows[image, :, pixel // width, pixel % width]  # [N, C, h, w]
    return chosen.reshape(len(drawn), layer.inner.groups, -1).transpose(0, 1)


def _drawn(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most] if most < count else torch.arange(count)


def _windows(inner: nn.Conv2d, x: Tensor, *, padded: bool) -> Tensor:
    """A view of the input: [B, C, H, W, h, w], what the kernel covers at every pixel of the output."""
    if not padded:
        mode = "constant" if inner.padding_mode == "zeros" else inner.padding_mode
        x = nn.functional.pad(x, inner._reversed_padding_repeated_twice, mode)
    spans = zip((2, 3), inner.kernel_size, inner.stride, inner.dilation, strict=True)
    for axis, size, stride, dilation in spans:
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


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
