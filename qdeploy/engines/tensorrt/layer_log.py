"""The layers of a plan as the builder logs them, in the dictionaries that the engine inspector gives as JSON.

TensorRT for RTX compiles ahead of time on machines without a GPU, where no engine can be opened and asked. With
``Logger.VERBOSE`` and ``ProfilingVerbosity.DETAILED``, the end of the build lists every layer with the same fields as
the inspector, as text: one line a layer, tensors in braces. The format has no version and no documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from qdeploy.system.errors import InvalidInputError

BEGINNING = "Layers:"
_LAYER = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>.*?), Inputs: \[(?P<Inputs>.*?)\], "
    r"Constants: \[(?P<Constants>.*?)\], Outputs: \[(?P<Outputs>.*?)\], TacticName: (?P<TacticName>.*?), "
    r"StreamId: .*?, Metadata: ?(?P<Metadata>.*)"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[-\d,]*)\], .*?Datatype: (?P<Datatype>\w+)"
    r"(?:, Format: (?P<Format>.*?))? \}"
)


def is_layer_list(message: str) -> bool:
    """Whether a message of the builder's is the list of layers."""
    return message.lstrip().startswith(BEGINNING)


def parse_layer_log(message: str) -> list[dict[str, Any]]:
    """The layers in the builder's message.

    Raises:
        InvalidInputError: a line of the list cannot be read.
    """
    body = message.partition(BEGINNING)[2].partition("\n\n")[0]
    lines = [line for line in body.splitlines() if line.strip()]
    return [_layer(line.strip()) for line in lines if line.strip().startswith("Name: ")]


def last_layer_list(messages: Iterable[str]) -> str | None:
    """The last list of layers among the builder's messages."""
    found = None
    for message in messages:
        if is_layer_list(message):
            found = message
    return found


def _layer(line: str) -> dict[str, Any]:
    match = _LAYER.fullmatch(line)
    if match is None:
        raise InvalidInputError(
            f"the build log lists a layer in a form that is not known: {line[:80]!r}: report this version of "
            "the library"
        )
    layer: dict[str, Any] = match.groupdict()
    for side in ("Inputs", "Constants", "Outputs"):
        layer[side] = [_tensor(tensor) for tensor in _TENSOR.finditer(layer[side])]
    return layer


def _tensor(match: re.Match[str]) -> dict[str, Any]:
    sizes = [int(size) for size in match["Dimensions"].split(",") if size]
    tensor = {"Name": match["Name"], "Dimensions": sizes, "Datatype": match["Datatype"]}
    return tensor | ({"Format": match["Format"]} if match["Format"] else {})
