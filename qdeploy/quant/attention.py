"""Quantized attention: q, k, v and the softmax output, as Q-Diffusion quantizes them.

Kernels of attention multiply integers without zero points, so q, k and v are symmetric where an engine is to run it
(`qdeploy.recipe.recipe.Recipe.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qdeploy.quant.log_attention import LogQuantizer, split_start
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.recipe.formats import Format

MOST_SCORES = 2**26  # of an attention that are held at a time: 256 MiB in float32, and some copies


class Unquantized(nn.Module):
    """In place of a quantizer: leaves what it is given as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def restore(self, y: Tensor) -> Tensor:
        """Nothing was taken out of what is quantized."""
        return y


class AttentionQuantizers(nn.Module):
    """Quantizers of one attention module's matrix products.

    Args:
        activations: format of q, k and v.
        probabilities: unsigned format of the softmax output, whose zero point stays 0; None leaves it in float.
    """

    def __init__(self, activations: Format, probabilities: Format | None) -> None:
        super().__init__()
        self.query = ActivationQuantizer(activations)
        self.key = ActivationQuantizer(activations)
        self.value = ActivationQuantizer(activations)
        self.probabilities: ActivationQuantizer | LogQuantizer | Unquantized = (
            Unquantized() if probabilities is None else ActivationQuantizer(probabilities)
        )
        self.quantized = True

    @property
    def start(self) -> bool:
        """Whether the first key is a start token that bypasses quantization."""
        return isinstance(self.probabilities, LogQuantizer) and self.probabilities.start

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """``softmax(q k^T scale + mask) v`` with quantized operands; shapes [B, heads, tokens, d].

        The scale is applied after the product, as Stable Diffusion's attention does; so are the factors of a group of
        timesteps, for an engine multiplies integers.
        """
        kept = key[..., : int(self.start), :]
        query, key, value = (
            quantizer(x) if self._late(quantizer) else quantizer.restore(quantizer(x))
            for quantizer, x in (
                (self.query, query),
                (self.key, key[..., int(self.start) :, :]),
                (self.value, value),
            )
        )
        key = torch.cat([kept, key], -2) if self.start else key
        scale = scale or 1 / math.sqrt(query.shape[-1])
        if not _many(query, key):
            return self._products(query, key, value, attn_mask, is_causal, scale)
        heads = []
        for head in range(query.shape[1]):
            q, k, v = (_head(x, head) for x in (query, key, value))
            mask = None if attn_mask is None else _head(attn_mask, head)
            heads.append(self._products(q, k, v, mask, is_causal, scale))
        return torch.cat(heads, 1)

    def _products(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """What is left to do with quantized operands."""
        logits = query @ key.transpose(-2, -1)
        for quantizer in filter(self._late, (self.query, self.key)):
            logits = quantizer.restore(logits)
        logits = logits * scale
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        if is_causal:
            past = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~past, -torch.inf)
        probabilities = self.probabilities(logits.softmax(-1))
        if not self._late(self.probabilities):
            probabilities = self.probabilities.restore(probabilities)
        if self.start:
            return split_start(probabilities, value)
        output: Tensor = probabilities @ value
        for last in filter(self._late, (self.probabilities, self.value)):
            output = last.restore(output)
        return output

    def _late(self, quantizer: nn.Module) -> bool:
        """Whether a quantizer's factor is one for all tokens, so that it may wait until after the product."""
        return isinstance(quantizer, ActivationQuantizer) and quantizer.axis is None and not self.start


def _many(query: Tensor, key: Tensor) -> bool:
    """Whether the scores of all heads are too many to hold at once; never where gradients or a graph are made."""
    if torch.compiler.is_exporting() or torch.is_grad_enabled() or query.ndim != 4:
        return False
    return query.shape[1] == key.shape[1] and query.shape[:-1].numel() * key.shape[-2] > MOST_SCORES


def _head(x: Tensor, head: int) -> Tensor:
    """One head of a tensor, or all of it where heads share it."""
    return x[:, head : head + 1] if x.ndim == 4 and x.shape[1] > 1 else x


class _Intercept(TorchFunctionMode):
    def __init__(self, quantizers: AttentionQuantizers) -> None:
        super().__init__()
        self.quantizers = quantizers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention and self.quantizers.quantized:
            return self.quantizers.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def intercepted(module: nn.Module) -> AbstractContextManager[Any]:
    """Within, a module's ``forward`` attends with its quantizers, if it has some: for a forward pass that
    is repeated without the module's hooks."""
    quantizers = module._modules.get("attention_quantizers")
    return _Intercept(quantizers) if isinstance(quantizers, AttentionQuantizers) else nullcontext()


def quantize_attention(module: nn.Module, quantizers: AttentionQuantizers) -> None:
    """Make ``module`` compute its scaled dot-product attention with ``quantizers``.

    The module keeps its place and its paths; its attention call is intercepted while it runs.
    """
    module.add_module("attention_quantizers", quantizers)
    active: list[_Intercept] = []

    def before(module: nn.Module, args: Any) -> None:
        active.append(_Intercept(quantizers))
        active[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        active.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
