"""Second moments of what layers read, streamed over calibration rows: of convolutions as of products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.quant.layer import QuantizedLayer


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
        [groups, N, K], the K numbers in the order of the parts of the weight, each as of ``weight.flatten(1)``.
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

    Attributes:
        count: vectors that were seen.
        square: [groups, K, K] sum of ``x x^T``.
        total: [groups, K] sum of x.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        groups, columns = columns_of(layer)
        self.count = 0
        self.square = torch.zeros(groups, columns, columns, device=layer.device)
        self.total = torch.zeros(groups, columns, device=layer.device)

    def add(self, x: Tensor) -> None:
        """Take vectors [groups, N, K] into account."""
        x = x.detach().float()
        self.count += x.shape[1]
        self.square.baddbmm_(x.transpose(1, 2), x)
        self.total += x.sum(1)

    @property
    def mean(self) -> Tensor:
        """[groups, K] mean of the vectors."""
        return self.total / max(1, self.count)

    def hessian(self, centred: bool) -> Tensor:
        """[groups, K, K] mean of ``x x^T``; with ``centred``, of what is left of x without its mean."""
        hessian, mean = self.square / max(1, self.count), self.mean
        return hessian - mean[:, :, None] * mean[:, None, :] if centred else hessian
