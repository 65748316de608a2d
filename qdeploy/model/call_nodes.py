"""Nodes of the tree of a call's arguments, as JSON: see `qdeploy.model.call`."""

from __future__ import annotations

import math
from typing import Any

Node = dict[str, Any]
_NESTED = ("tuple", "list", "dict", "each")


def shown(node: Node | None) -> str:
    """A node for people, in Python's notation."""
    if node is None:
        return "its default"
    ((kind, content),) = node.items()
    if kind in ("tensor", "complex"):
        return "a tensor"
    if kind == "value":
        return repr(content)
    if kind == "each":
        return f"[{shown(content)}] for each row"
    if kind == "dict":
        return "{" + ", ".join(f"{key!r}: {shown(value)}" for key, value in content.items()) + "}"
    inner = ", ".join(map(shown, content))
    return f"[{inner}]" if kind == "list" else f"({inner}{',' if len(content) == 1 else ''})"


def is_node(node: Any) -> bool:
    """Whether this is a node."""
    if not isinstance(node, dict) or len(node) != 1:
        return False
    ((kind, content),) = node.items()
    if kind in ("tensor", "complex"):
        return isinstance(content, str)
    if kind == "value":
        return content is None or isinstance(content, bool | int | float | str)
    if kind == "each":
        return is_node(content)
    if kind == "dict":
        return isinstance(content, dict) and all(map(is_node, content.values()))
    return kind in ("tuple", "list") and isinstance(content, list) and all(map(is_node, content))


def has_tensors(node: Node) -> bool:
    """Whether a node holds tensors."""
    ((kind, content),) = node.items()
    if kind not in _NESTED:
        return kind in ("tensor", "complex")
    parts = content.values() if kind == "dict" else [content] if kind == "each" else content
    return any(map(has_tensors, parts))


def is_nothing(node: Node) -> bool:
    """Whether an argument is a dictionary of nothing, such as ``cross_attention_kwargs={"scale": None}``."""
    return "dict" in node and all(v == {"value": None} or is_nothing(v) for v in node["dict"].values())


def same(ours: Node | None, theirs: Node | None, rows: int) -> bool:
    """Whether two calls give the same function this argument; None is its default, ``rows`` those of the second."""
    if ours is None or theirs is None:
        return all(node is None or is_nothing(node) for node in (ours, theirs))
    ((kind, mine),) = ours.items()
    if kind == "each":
        return "list" in theirs and theirs["list"] == [mine] * rows
    if set(theirs) != {kind}:
        return False
    other = theirs[kind]
    if kind == "value":
        both_nan = (
            isinstance(mine, float) and isinstance(other, float) and math.isnan(mine) and math.isnan(other)
        )
        return both_nan or (mine == other and isinstance(mine, bool) == isinstance(other, bool))
    if kind in ("tensor", "complex"):
        return bool(mine == other)
    pairs: list[tuple[Node, Node]]
    if kind == "dict":
        names = [*mine, *(key for key in other if key not in mine)]
        given = [(mine.get(key), other.get(key)) for key in names]
        pairs = [(one or {"value": None}, another or {"value": None}) for one, another in given]
    else:
        if len(mine) != len(other):
            return False
        pairs = list(zip(mine, other, strict=True))
    return all(same(one, another, rows) for one, another in pairs)
