"""The arguments of a denoiser's call: which of them are tensors, and which are constants.

A call of ``forward`` is a tree of arguments. Its tensors are data: each has a flat name, under which calibration
sets hold it and graphs take it. Everything else (integers, strings, None, the lengths of tuples) is a constant: it
belongs to the function that is calibrated, and another value makes another function.

    hidden_states=x                       tensor "hidden_states"
    added_cond_kwargs={"time_ids": x}     tensor "added_cond_kwargs.time_ids"
    image_rotary_emb=(x, y)               tensors "image_rotary_emb.0" and "image_rotary_emb.1"
    num_frames=3                          constant
    timestep_ratio=t                      tensor "timestep", whatever the parameter is called

A `CallForm` is the tree with names in the place of tensors. As JSON a node is one of

    {"tensor": NAME}   {"complex": NAME}   {"value": 3}   {"tuple": [...]}   {"list": [...]}   {"dict": {...}}
    {"each": node}     a list with that entry once for every row of the sample

where a complex tensor is stored as a real one with a last axis of two.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qdeploy.model.call_nodes import Node, has_tensors, is_node, is_nothing, same, shown
from qdeploy.store.facts import CallFacts
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

TIMESTEPS = ("timestep", "timestep_ratio", "r", "t")  # what denoisers call the timestep
_MANNERS = ("return_dict",)  # say how to answer, not what to compute


def time_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The parameter that takes the timestep; None if there is none."""
    return next((name for name in TIMESTEPS if name in parameters), None)


@dataclass(frozen=True)
class CallForm:
    """How the arguments of a call are made of named tensors and constants.

    Attributes:
        arguments: a node for each parameter that is given something else than its default.
        shared: tensors that are given once for all rows of the sample, with their number of axes.
    """

    arguments: Mapping[str, Node]
    shared: Mapping[str, int] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it follows from the flat names alone: every argument is a tensor or a dictionary of tensors."""
        return not self.shared and all(
            node == {"tensor": name}
            or (
                "dict" in node
                and all(value == {"tensor": f"{name}.{key}"} for key, value in node["dict"].items())
            )
            for name, node in self.arguments.items()
        )

    @property
    def constants(self) -> list[str]:
        """Names of the arguments that are no tensors and no dictionaries of tensors, and are not nothing."""
        every = self.arguments.items()
        return [name for name, node in every if not (is_nothing(node) or CallForm({name: node}).plain)]

    def to_facts(self) -> CallFacts:
        """The form as artifacts hold it."""
        return CallFacts(arguments=dict(self.arguments), shared=dict(self.shared))

    @classmethod
    def of(cls, facts: CallFacts | None) -> CallForm | None:
        """The form that an artifact holds; None for calls that are plain.

        Raises:
            InvalidInputError: it holds something else.
        """
        if facts is None:
            return None
        for name, node in facts.arguments.items():
            if not is_node(node):
                raise InvalidInputError(f"the artifact's description of the argument {name!r} is invalid")
        return cls(dict(facts.arguments), dict(facts.shared))

    def build(self, inputs: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
        """The arguments, with these tensors in their places.

        Args:
            inputs: tensors by flat name. One that is shared may have an axis for the rows before its own; its first
                row is taken then.
            rows: of the sample.
        """

        def make(node: Node) -> Any:
            ((kind, content),) = node.items()
            if kind in ("tensor", "complex"):
                return self._tensor(inputs, content, kind)
            if kind == "value":
                return content
            if kind == "dict":
                return {key: make(value) for key, value in content.items()}
            if kind == "each":
                return [make(content) for _ in range(_counted(rows))]
            made = [make(value) for value in content]
            return tuple(made) if kind == "tuple" else made

        return {name: make(node) for name, node in self.arguments.items()}

    def _tensor(self, inputs: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
        import torch

        value = inputs[name]
        if name in self.shared and value.ndim == self.shared[name] + 1:
            value = value[0]
        return torch.view_as_complex(value) if kind == "complex" else value

    def difference(self, other: CallForm, rows: int) -> str | None:
        """What a call of another form does differently, as part of a sentence; None if it is the same function.

        Args:
            other: the form of a call that was read.
            rows: of that call's sample.
        """
        for name in [*self.arguments, *other.arguments]:
            ours, theirs = self.arguments.get(name), other.arguments.get(name)
            if not same(ours, theirs, rows):
                return f"{name}={shown(theirs)} instead of {name}={shown(ours)}"
        return None


def read_call(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str = "the pipeline",
) -> tuple[CallForm, dict[str, Tensor]]:
    """The form of a call, and its tensors by flat name.

    Which tensors are shared is not known from one call (`settle` finds it out).

    Args:
        signature: of the denoiser's ``forward``, without ``self``.
        args: given by position.
        kwargs: given by name.
        where: who calls, for messages.

    Raises:
        InvalidInputError: an argument is something that no graph can take, such as an object of the pipeline's.
        TypeError: the arguments do not fit the signature.
    """
    import torch

    given = dict(signature.bind(*args, **kwargs).arguments)
    parameters = dict(signature.parameters)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, ()):
            raise InvalidInputError(
                f"{where} passes its denoiser arguments without names: they cannot be recorded"
            )
    time = time_parameter(parameters)
    tensors: dict[str, Tensor] = {}

    def read(value: Any, name: str) -> Node:
        if isinstance(value, torch.Tensor):
            tensors[name] = torch.view_as_real(value) if value.is_complex() else value
            return {"complex" if value.is_complex() else "tensor": name}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, Mapping):
            return {"dict": {str(key): read(item, f"{name}.{key}") for key, item in value.items()}}
        if isinstance(value, list | tuple):
            items = [read(item, f"{name}.{number}") for number, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        if hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
            return {"value": value.item()}
        raise InvalidInputError(
            f"{where} passes its denoiser {name} as a {type(value).__name__}, which no graph can take: only "
            "tensors, numbers, texts, None, and lists, tuples and dictionaries of these can be recorded"
        )

    arguments: dict[str, Node] = {}
    for name, value in given.items():
        if name in _MANNERS or _is_default(value, parameters.get(name)):
            continue
        if name == time:
            tensors["timestep"] = torch.as_tensor(value)
            arguments[name] = {"tensor": "timestep"}
        else:
            arguments[name] = read(value, name)
    return CallForm(arguments), tensors


def settle(calls: list[tuple[CallForm, Mapping[str, Tensor], int]]) -> CallForm:
    """One form for calls with different numbers of rows: what counts rows in all of them has rows.

    Args:
        calls: form and tensors of each call, and the number of its rows.
    """
    first = calls[0][0]
    shared = {
        name: tensor.ndim
        for name, tensor in calls[0][1].items()
        if name != "timestep"
        and any(
            tensors[name].ndim == 0 or len(tensors[name]) != rows
            for _, tensors, rows in calls
            if name in tensors
        )
    }

    def per_row(nodes: list[Node]) -> Node:
        """Lists of constants with one entry for each row become ``each``."""
        ((kind, content),) = nodes[0].items()
        if kind == "list" and not has_tensors(nodes[0]):
            lists = [node.get("list") for node in nodes]
            uniform = all(
                items is not None and len(items) == rows and all(item == items[0] for item in items)
                for items, (_, _, rows) in zip(lists, calls, strict=True)
            )
            if uniform and content:
                return {"each": content[0]}
        return nodes[0]

    arguments = {
        name: per_row([form.arguments.get(name, {"value": None}) for form, _, _ in calls])
        for name in first.arguments
    }
    return CallForm(arguments, shared)


def plain_arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a plain form: tensors by parameter, and dictionaries of the tensors with dotted names."""
    nested: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    if parameter is None or parameter.default is parameter.empty:
        return False
    simple = value is None or isinstance(value, bool | int | float | str)
    return simple and type(value) is type(parameter.default) and bool(value == parameter.default)


def _counted(rows: int) -> int:
    """A number of rows to count by. While a graph is traced it is a symbol, which counting would make a constant."""
    if isinstance(rows, int):
        return rows
    from torch.fx.experimental.symbolic_shapes import guarding_hint_or_throw

    return guarding_hint_or_throw(rows)


def signature_of(denoiser: Any) -> inspect.Signature:
    """What a denoiser's ``forward`` takes; stand-ins say it of the class that they stand in for."""
    found = getattr(denoiser, "signature", None)
    return found if isinstance(found, inspect.Signature) else inspect.signature(denoiser.forward)
