"""What a denoiser is made of, found by running it once: no list of module names decides anything.

One traced forward gives the weighted layers in execution order, the layers that read one tensor, the
layers that read a concatenation (split shortcuts), the modules that attend, and on a tape the operations
that only the timestep leads to. A second run with another sample, other conditions and the same timestep
confirms which layers depend on the timestep alone: their outputs are bit-identical.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qdeploy.model.inputs import form_of, sample_name
from qdeploy.network.observe import ModuleCall
from qdeploy.network.time_path import Tape, TimePart
from qdeploy.network.tracer import Tracer
from qdeploy.network.units import find_units
from qdeploy.system.errors import InvalidInputError


@dataclass(frozen=True)
class Layer:
    """One weighted layer.

    Attributes:
        path: its name in the module tree.
        order: its place in the order of execution.
        unit: path of the reconstruction unit that it belongs to.
        reads: path of the first layer of the unit that reads the same input tensor.
        split: channels of the parts, if its input is a concatenation along the channels; else empty.
        temporal: whether its output depends on the timestep alone.
        first: whether it is the first layer that sees the sample.
        last: whether it is the last layer of the network.
        shortcut: whether it reads its block's own input in parallel to other layers of the block.
        resamples: whether its output has another spatial size than its input.
        attention: whether it is a layer of a module that attends, or a linear layer (a feed-forward one) of
            the unit that holds such a module; layers that depend on the timestep alone are not.
        macs: multiply-accumulate operations per sample at the traced size.
    """

    path: str
    order: int
    unit: str
    reads: str
    split: tuple[int, ...]
    temporal: bool
    first: bool
    last: bool
    macs: int
    shortcut: bool = False
    resamples: bool = False
    attention: bool = False


@dataclass(frozen=True)
class Structure:
    """A denoiser's layers, units and attention modules, each in execution order.

    Attributes:
        layers: the weighted layers.
        attentions: paths of the modules that attend.
        time: what depends on the timestep alone, as a function.
        products: multiply-accumulate operations per sample of each attention module's two products.
    """

    layers: tuple[Layer, ...]
    attentions: tuple[str, ...]
    time: TimePart = field(default_factory=TimePart)
    products: Mapping[str, int] = field(default_factory=dict)

    @property
    def units(self) -> dict[str, list[Layer]]:
        """The layers of each reconstruction unit; units in the order of their first layer."""
        units: dict[str, list[Layer]] = {}
        for layer in self.layers:
            units.setdefault(layer.unit, []).append(layer)
        return units

    def __getitem__(self, path: str) -> Layer:
        return next(layer for layer in self.layers if layer.path == path)


def find_structure(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Structure:
    """Trace a denoiser.

    Args:
        denoiser: the network, in evaluation mode.
        inputs: one row or more of its inputs, named as `qdeploy.model.inputs.flatten_inputs` names them.

    Raises:
        InvalidInputError: it does not run with one row. Some networks take several rows of an input for each row of
            their sample (AnimateDiff: the prompt once for every frame).
    """
    one_row = _first_row(denoiser, inputs)
    try:
        trace = _run(denoiser, one_row)
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in one_row.items())
        raise InvalidInputError(
            f"{type(denoiser).__name__} does not run with one row of its recorded inputs ({shapes}): {first}"
        ) from error
    other = _run_otherwise(denoiser, one_row)
    time_only = {
        path
        for path in trace.from_time
        if path in other.outputs and torch.equal(trace.outputs[path], other.outputs[path])
    }
    units = find_units(denoiser, {layer.path for layer in trace.layers})
    firsts: dict[tuple[str, int], str] = {}
    layers: list[Layer] = []
    for layer, source in zip(trace.layers, trace.inputs, strict=True):
        unit = next(path for path in units if layer.path == path or layer.path.startswith(f"{path}."))
        reads = firsts.setdefault((unit, source), layer.path)
        temporal = layer.path in time_only
        parallel = not temporal and unit != layer.path and trace.given.get(unit) == source
        attends = not temporal and _attends(denoiser, layer.path, unit, trace.attentions)
        layers.append(
            replace(layer, unit=unit, reads=reads, temporal=temporal, shortcut=parallel, attention=attends)
        )
    spatial = [layer.order for layer in layers if not layer.temporal]
    ends = (min(spatial), max(spatial)) if spatial else (-1, -1)
    return Structure(
        tuple(
            replace(
                layer,
                first=layer.order == ends[0],
                last=layer.order == ends[1],
                split=() if layer.temporal else layer.split,
            )
            for layer in layers
        ),
        tuple(trace.attentions),
        trace.tape.time_part(trace.result, time_only),
        dict(trace.attentions),
    )


def _attends(denoiser: nn.Module, path: str, unit: str, attentions: Iterable[str]) -> bool:
    inside = any(path.startswith(f"{attention}.") for attention in attentions)
    same_unit = any(f"{attention}.".startswith(f"{unit}.") for attention in attentions)
    return inside or (same_unit and isinstance(denoiser.get_submodule(path), nn.Linear))


def _first_row(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    form, rows = form_of(denoiser), len(inputs[sample_name(denoiser)])
    shared = {} if form is None else form.shared

    def first(name: str, value: Tensor) -> Tensor:
        given_once = value.ndim == shared.get(name, -1)
        return value[:1] if value.ndim and len(value) == rows and not given_once else value

    row = {name: first(name, value) for name, value in inputs.items()}
    return {**row, "timestep": inputs["timestep"].reshape(-1)[:1]}


class _StructureTracer(Tracer):
    """Records layers, concatenations, attention and the time path.

    Of the tensors that pass, numbers are kept and no values, so that a run takes no more memory than without
    it; only what comes from the timestep alone, which is small, is kept to be compared.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.result: Any = None
        self.from_time: set[str] = set()
        self.layers: list[Layer] = []
        self.inputs: list[int] = []  # numbers of the tensors that layers read
        self.outputs: dict[str, Tensor] = {}  # of layers that are in `from_time`, or were
        self.attentions: Counter[str] = Counter()
        self.given: dict[str, int | None] = {}  # numbers of the tensors that modules are given first
        self._parts: Any = WeakIdKeyDictionary()
        self._numbers: Any = WeakIdKeyDictionary()
        self._counter = itertools.count()
        self._called: set[str] = set()

    def operation(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        if function in (torch.cat, torch.concat, torch.concatenate) and isinstance(result, Tensor):
            given: dict[str, Any] = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
            dim = int(given.get("dim", given.get("axis", 0)) or 0) % result.ndim
            self._parts[result] = (tuple(part.shape[dim] for part in given["tensors"]), dim)
        if function is nn.functional.scaled_dot_product_attention and self.running:
            self.attentions[self.running[-1]] += _product_macs(*_operands(args, kwargs))
        self.tape.record(function, args, kwargs, result)

    def module_begins(self, call: ModuleCall) -> None:
        first = call.args[0] if call.args else None
        self.given.setdefault(call.name, self._number(first) if isinstance(first, Tensor) else None)

    def layer_ends(self, call: ModuleCall) -> None:
        path, source, output = call.name, call.args[0], call.output
        self.tape.record(path, call.args, {}, output)
        if path in self._called:
            if path in self.outputs and not torch.equal(self.outputs[path], output):
                self.from_time.discard(path)  # one table cannot stand for both calls
            return
        self._called.add(path)
        if self.tape.holds(output):
            self.from_time.add(path)
            self.outputs[path] = output
        self.inputs.append(self._number(source))
        weight = cast(Tensor, call.module.weight)
        macs = output[0].numel() * weight[:1].numel()
        spatial = source.ndim == output.ndim == 4
        self.layers.append(
            Layer(
                path,
                len(self.layers),
                path,
                path,
                self._split(source, call.module),
                temporal=False,
                first=False,
                last=False,
                macs=macs,
                resamples=spatial and source.shape[2:] != output.shape[2:],
            )
        )

    def _number(self, tensor: Tensor) -> int:
        """The same for the same tensor, and for no other of this run."""
        number: int = self._numbers.setdefault(tensor, next(self._counter))
        return number

    def _split(self, source: Tensor, module: nn.Module) -> tuple[int, ...]:
        inner = getattr(module, "inner", module)
        features = source.ndim - 1 if isinstance(inner, nn.Linear) else 1
        sizes, dim = self._parts.get(source, ((), -1))
        grouped = getattr(inner, "groups", 1) > 1
        return sizes if dim == features and len(sizes) == 2 and not grouped else ()


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a call of scaled dot-product attention, by place or by name."""
    query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
    return query, key, value


def _product_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of q k^T and of the product with v; shapes [..., tokens, d], one row."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _run(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> _StructureTracer:
    others = [value for name, value in inputs.items() if name != "timestep"]
    tracer = _StructureTracer(Tape(inputs["timestep"], others))
    tracer.result = tracer.trace(denoiser, inputs)
    return tracer


def _run_otherwise(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> _StructureTracer:
    """A run with other values for everything but the timestep.

    Integers are moved by one. A table of one row knows no other index, and a network may refuse another length: then
    integers stay as they are. Bools always do, since a mask of nothing leaves attention nothing to attend to.
    """
    generator = torch.Generator().manual_seed(0)
    floats: dict[str, Tensor] = {}
    integers: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if name == "timestep" or value.dtype == torch.bool:
            continue
        if value.is_floating_point():
            floats[name] = value + torch.randn(value.shape, generator=generator).to(value)
        elif not value.is_complex():
            integers[name] = torch.where(value > 0, value - 1, value + 1).to(value.dtype)
    if not integers:
        return _run(denoiser, {**inputs, **floats})
    try:
        return _run(denoiser, {**inputs, **floats, **integers})
    except (IndexError, RuntimeError, ValueError, AssertionError):
        return _run(denoiser, {**inputs, **floats})
