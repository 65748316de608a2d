"""Find where each block consumes the timestep embedding, by tracing one call.

Two patterns are recognised, by what is computed and not by name (QNCD, arXiv 2403.19140, section 3.1):

    additive        layer(f(GroupNorm(h + e)))
    scale-shift     layer(f(norm(h) * (1 + scale) + shift))

where e, or scale and shift together, are the output of a layer of the time path, one value per channel, and f is
a pointwise activation. Classes or texts may have entered the embedding before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from qdeploy.network.observe import ModuleCall
from qdeploy.network.tracer import Tracer

ADDITIVE, SCALE_SHIFT = "additive", "scale-shift"
_POINTWISE = {
    nn.functional.silu,
    nn.functional.mish,
    nn.functional.gelu,
    nn.functional.relu,
    nn.functional.dropout,
    Tensor.to,
    Tensor.contiguous,
    Tensor.type,
}
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_MULTIPLY = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}


@dataclass(frozen=True)
class Modulation:
    """One place where the embedding enters.

    Attributes:
        kind: ``additive`` or ``scale-shift``.
        projection: path of the layer that computes the embedding.
        start: the first of its output channels that is e, or scale.
        channels: C, how many these are.
        layers: paths of the layers that read the modulated tensor, in execution order.
        gamma: [C] the normalisation's weight, None for ones; of additive ones.
        groups: of the normalisation; of additive ones.
        eps: of the normalisation; of additive ones.
    """

    kind: str
    projection: str
    start: int
    channels: int
    layers: tuple[str, ...] = ()
    gamma: Tensor | None = field(default=None, compare=False)
    groups: int = 1
    eps: float = 0.0

    def embedding(self, output: Tensor) -> Tensor:
        """e, or scale, from the projection's output: [T, ...] to [T, C]."""
        return output.flatten(1)[:, self.start : self.start + self.channels]


def find_modulations(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Modulation, ...]:
    """Trace a denoiser, in the state that it is in.

    Args:
        denoiser: the network, in evaluation mode; its layers may be quantized, but must be switched off.
        inputs: one row of its inputs, named as `qdeploy.model.inputs.flatten_inputs` names them.

    Returns:
        The places in execution order of their first layers.
    """
    tracer = _ModulationTracer()
    tracer.trace(denoiser, inputs)
    return tuple(
        replace(mark.modulation, layers=tuple(mark.readers)) for mark in tracer.found if mark.readers
    )


@dataclass(frozen=True)
class _Embedding:
    """Values of a projection: channels from ``start`` on, and whether 1 was added to them."""

    projection: str
    offset: int  # of the projection's output in its storage
    storage: int
    start: int
    channels: int
    plus_one: bool = False


@dataclass
class _Modulated:
    """A tensor with an embedding in it; ready once it has been normalised too."""

    modulation: Modulation
    ready: bool
    readers: list[str] = field(default_factory=list)


class _ModulationTracer(Tracer):
    """Follows the outputs of layers of the time path, until a layer reads what it was added to or scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: Any = WeakIdKeyDictionary()
        self.found: list[_Modulated] = []
        self._held: list[Tensor] = []  # a freed storage could be taken for a projection's

    def operation(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            mark = self.marks.get(tensor)
            if mark is not None:
                others = [other for other in tensors if other is not tensor]
                self._follow(function, mark, tensor, others, args, kwargs, result)

    def layer_begins(self, call: ModuleCall) -> None:
        mark = self.marks.get(call.args[0]) if call.args else None
        if isinstance(mark, _Modulated) and mark.ready and call.name not in mark.readers:
            mark.readers.append(call.name)

    def layer_ends(self, call: ModuleCall) -> None:
        # One row with channels only: this value does not depend on the sample.
        output = call.output
        if isinstance(output, Tensor) and output.numel() == max(output.shape):
            self._held.append(output)
            offset = int(output.storage_offset())
            self.marks[output] = _Embedding(call.name, offset, _storage(output), 0, output.numel())

    def _follow(
        self,
        func: Callable[..., Any],
        mark: _Embedding | _Modulated,
        tensor: Tensor,
        others: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if isinstance(mark, _Embedding):
            self._follow_embedding(func, mark, tensor, others, result)
        elif func is nn.functional.group_norm and not mark.ready:
            given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
            normalised = replace(
                mark.modulation,
                gamma=given.get("weight"),
                groups=int(given["num_groups"]),
                eps=float(given.get("eps", 1e-5)),
            )
            self._open(result, _Modulated(normalised, ready=True))
        elif mark.ready and (func in _POINTWISE or (func in _ADD and result.shape == tensor.shape)):
            self.marks[result] = mark

    def _follow_embedding(
        self, func: Callable[..., Any], mark: _Embedding, tensor: Tensor, others: list[Tensor], result: Any
    ) -> None:
        views = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not others and all(_storage(view) == mark.storage for view in views) and func not in _ADD:
            for view in views:
                if view.is_contiguous() or view.numel() == max(view.shape, default=0):
                    start = int(view.storage_offset()) - mark.offset
                    self.marks[view] = replace(mark, start=start, channels=view.numel())
        elif not others and func in _ADD:
            self._held.append(result)
            self.marks[result] = replace(
                mark, plus_one=True, storage=_storage(result), offset=-mark.start + result.storage_offset()
            )
        elif len(others) == 1 and isinstance(result, Tensor) and result.shape == others[0].shape:
            kind = SCALE_SHIFT if func in _MULTIPLY and mark.plus_one else ADDITIVE
            known = isinstance(self.marks.get(others[0]), _Modulated)
            if kind is SCALE_SHIFT or (func in _ADD and not mark.plus_one and not known):
                modulation = Modulation(kind, mark.projection, mark.start, mark.channels)
                self._open(result, _Modulated(modulation, ready=kind is SCALE_SHIFT))

    def _open(self, tensor: Tensor, mark: _Modulated) -> None:
        self.marks[tensor] = mark
        self.found.append(mark)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
