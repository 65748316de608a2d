"""Reading ONNX into a network, and saying which node is at fault where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.dtypes import torch_name
from qdeploy.engines.tensorrt.graph import Graph
from qdeploy.engines.tensorrt.logger import create, last_errors
from qdeploy.system.errors import InvalidInputError


def parse(trt: Any, network: Any, path: Path, logger: Any) -> Any:
    """Parse a file into a network.

    Returns:
        The parser. It owns memory that the network's weights refer to: keep it until the build is done.

    Raises:
        InvalidInputError: the parser refuses the graph.
    """
    parser = create(trt.OnnxParser, network, logger, logger=logger)
    # A str, not a Path; absolute, because external data are searched in its folder.
    if not parser.parse_from_file(str(path.resolve())):
        raise InvalidInputError(f"TensorRT cannot parse {path.name}: {parser_errors(parser, logger)}")
    return parser


def parser_errors(parser: Any, logger: Any, most: int = 3) -> str:
    """What a parser complains of: the nodes with their reasons, in one line."""
    count = parser.num_errors
    if count == 0:
        return last_errors(logger)
    errors = "; ".join(_described(parser.get_error(index)) for index in range(min(count, most)))
    return errors + (f"; and {count - most} more" if count > most else "")


def _described(error: Any) -> str:
    reason = " ".join(str(error.desc()).split()).rstrip(".")
    code = str(error.code()).rpartition(".")[2]
    name, operator = error.node_name(), error.node_operator()
    where = f"node {error.node()}" + (f" {name!r}" if name else "") + (f" ({operator})" if operator else "")
    stack = list(error.local_function_stack()) if error.local_function_stack_size() else []
    inside = f" in {' > '.join(stack)}" if stack else ""
    return f"{where}{inside}: {reason} [{code}]"


def check_network(network: Any, graph: Graph) -> None:
    """Make sure that the parsed network has the graph's inputs and outputs, types and ranks included.

    Raises:
        InvalidInputError: it differs.
    """
    found = {}
    for count, get in ((network.num_inputs, network.get_input), (network.num_outputs, network.get_output)):
        for index in range(count):
            tensor = get(index)
            found[tensor.name] = (torch_name(tensor.dtype, tensor.name), len(tensor.shape))
    for port in graph.inputs:
        if port.name not in found:
            raise InvalidInputError(f"TensorRT dropped the input {port.name!r}: does the graph use it?")
    for port in (*graph.inputs, *graph.outputs):
        if found.get(port.name) != (port.dtype, len(port.shape)):
            raise InvalidInputError(
                f"the graph's {port.name!r} is {port.dtype} of {len(port.shape)} axes, but TensorRT made it "
                f"{found.get(port.name)}"
            )
