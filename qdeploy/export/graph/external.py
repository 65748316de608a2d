"""External data of ONNX files: the files that a graph reads its weights from, checked before anything reads them.

A graph can name any path as the location of a tensor, ``..`` and absolute ones included. Only plain names of regular
files in the folder of the graph are accepted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.store.files import copy_file
from qdeploy.store.names import contained, is_contained, name_problem
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    import onnx

LARGEST_GRAPH = 2**31  # bytes: the limit of the format itself


def locations(path: Path) -> list[str]:
    """What a graph names as the files that hold its external data, sorted; nothing is checked of them.

    Raises:
        InvalidInputError: the file is no ONNX.
    """
    import onnx

    if not path.is_file():
        raise InvalidInputError(f"{path} is missing, or not a regular file")
    if path.stat().st_size > LARGEST_GRAPH:
        raise InvalidInputError(f"{path} is no ONNX file: it has more than 2 GiB")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the parser's exceptions have no common base class
        raise InvalidInputError(f"{path} is damaged or no ONNX graph") from error
    if any(isinstance(text, bytes) for text in _texts(model)):
        raise InvalidInputError(f"{path} is damaged: names in it are no text")
    entries = (entry for tensor in _tensors(model) for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def is_elsewhere(path: Path, location: str) -> bool:
    """Whether a location is anything but a plain name of a regular file, or of none, in the graph's own folder."""
    if "/" in location or "\\" in location or name_problem(location):
        return True
    return os.path.lexists(path.parent / location) and not is_contained(path.parent, location)


def external_files(path: Path) -> list[str]:
    """Names of the files that hold external data of a graph, sorted; each checked.

    Raises:
        InvalidInputError: the file is no ONNX, or names a file that is not a regular one in its own folder.
    """
    names = locations(path)
    for name in names:
        if "/" in name or "\\" in name:
            raise InvalidInputError(
                f"{path} reads its weights from {name[:200]!r}, which is not a file of its own folder: do not use it"
            )
        if name.isprintable() and not os.path.lexists(path.parent / name):
            raise InvalidInputError(f"{path} has its weights in {name[:200]}, which is missing")
        contained(path.parent, name)
    return names


def check_external(path: Path, listed: Iterable[str] | None = None) -> None:
    """Refuse a graph that reads other files than those next to it.

    Args:
        path: the ONNX file.
        listed: names of the files next to it that it may read; any, if None.

    Raises:
        InvalidInputError: it does, or it is no ONNX file.
    """
    allowed = None if listed is None else set(listed)
    for name in external_files(path):
        if allowed is not None and name not in allowed:
            raise InvalidInputError(f"{path} reads its weights from {name}, which its artifact does not list")


def plain_graph(graph: Path, work: Path) -> Path:
    """The graph itself, or a copy where its files are links, as in the Hub's cache: most readers refuse those.

    Args:
        graph: the ONNX file of a verified artifact.
        work: folder for the copy; it is made when there is a need for one.

    Raises:
        InvalidInputError: the graph reads other files than those next to it, or is no ONNX file.
    """
    names = [graph.name, *external_files(graph)]
    if not any((graph.parent / name).is_symlink() for name in names):
        return graph
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        copy_file(contained(graph.parent, name), work / name)
    return work / graph.name


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Names in a model; the parser leaves those as bytes that are not UTF-8."""
    yield from (entry.domain for entry in model.opset_import)
    for graph in _graphs(model):
        for values in (graph.input, graph.output, graph.value_info, graph.initializer):
            yield from (value.name for value in values)
    for node in _nodes(model):
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: of its graph, of inner graphs, and of its functions."""
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph of a model, and the inner graphs of all nodes."""
    yield model.graph
    for node in _nodes(model):
        yield from _inner(node)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model: of its graph, of inner graphs, and of its functions."""
    left = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while left:
        node = left.pop()
        yield node
        left += (inner for graph in _inner(node) for inner in graph.node)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
