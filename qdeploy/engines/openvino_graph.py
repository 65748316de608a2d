"""From an ONNX graph to the IR that runs fastest on OpenVINO's CPU plugin, and computes what was calibrated."""

from __future__ import annotations

import errno
import os
import re
import shutil
from math import inf, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qdeploy.engines.base import why
from qdeploy.engines.openvino_timestep import take_whole_timesteps
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.machine import int8_sums_saturate
from qdeploy.system.telemetry import import_silently

MODEL = "openvino_model.xml"
# Operations whose output holds the same values as their input, only elsewhere.
_MOVES = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "Interpolate", "MaxPool",
    "Relu", "Clamp", "Pad", "Split", "VariadicSplit", "Convert",
}  # fmt: skip


def build(
    onnx_path: Path, folder: Path, *, device: str = "CPU", precision: str = "f32", batch: int = 1
) -> None:
    """Convert a graph to IR: ``openvino_model.xml`` and ``.bin``, equal bytes for equal graphs.

    Args:
        onnx_path: the graph.
        folder: where the IR goes.
        device: what it is meant for. One IR is for all of them, as for all batch sizes and precisions.
        precision: as above.
        batch: as above.

    Raises:
        InvalidInputError: OpenVINO has no rule for one of the operations, or cannot read the graph.
    """
    openvino = import_silently("openvino")

    try:
        with TemporaryDirectory() as scratch:
            model = openvino.Core().read_model(_adapted(onnx_path, Path(scratch)))
    except RuntimeError as error:
        # Operations without a rule come before the operations that fail because of them.
        lacking = re.search("No conversion rule found for operations: .+", str(error))
        reason = lacking[0] if lacking else why(error)
        raise InvalidInputError(
            f"OpenVINO cannot convert {onnx_path.parent.name}/{onnx_path.name}: {reason}"
            f"{_where(onnx_path, reason)}"
        ) from error
    keep_concat_apart(model)
    read_keys_as_they_are(model)
    if folder.name == "unet":
        take_whole_timesteps(model)
    _name_deterministically(model)
    folder.mkdir(parents=True, exist_ok=True)
    names = _statistics(model)
    save(model, folder / MODEL)
    _keep_in_f32(folder / MODEL, names)


def build_component(onnx_path: Path, folder: Path, precision: str) -> None:
    """Convert the graph of a text encoder or an autoencoder to IR, its weights in 16 bits where it computes in 16.

    Raises:
        InvalidInputError: OpenVINO cannot convert it.
    """
    openvino = import_silently("openvino")

    try:
        model = openvino.Core().read_model(onnx_path)
    except RuntimeError as error:
        raise InvalidInputError(
            f"OpenVINO cannot convert {onnx_path.parent.name}/{onnx_path.name}: {why(error)}"
        ) from error
    _name_deterministically(model)
    folder.mkdir(parents=True, exist_ok=True)
    names = _statistics(model)
    save(model, folder / MODEL, compress_to_fp16=precision != "f32")
    _keep_in_f32(folder / MODEL, names)


def save(model: Any, file: Path, compress_to_fp16: bool = False) -> None:
    """Write an IR.

    Raises:
        OSError: no space is left: what OpenVINO says of a write that failed names no reason.
    """
    try:
        import_silently("openvino").save_model(model, file, compress_to_fp16=compress_to_fp16)
    except RuntimeError as error:
        if "iostream" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _adapted(onnx_path: Path, scratch: Path) -> Path:
    """A file with the graph in the form that runs fastest here; the file itself if that is it already."""
    import onnx_ir as ir

    from qdeploy.export.lower import AS_BUILT, adapt
    from qdeploy.export.passes.narrow_sums import NarrowSums

    try:
        graph = ir.load(onnx_path)
    except Exception:  # OpenVINO's own message will state what is wrong
        return onnx_path
    if not adapt(graph, (*AS_BUILT, NarrowSums) if int8_sums_saturate() else AS_BUILT):
        return onnx_path
    stored = (value.const_value for value in graph.graph.initializers.values())
    for location in {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}:
        _put(onnx_path.parent / location, scratch / location)
    ir.save(graph, scratch / onnx_path.name)
    return scratch / onnx_path.name


def _put(file: Path, place: Path) -> None:
    """The same file at another place. OpenVINO reads no weights through a symbolic link that leads elsewhere."""
    try:
        os.link(file, place)
    except OSError:  # another file system, or somebody else's file
        shutil.copyfile(file, place)


def _where(onnx_path: Path, message: str) -> str:
    """Names of the first nodes whose operations a message mentions."""
    from qdeploy.export.graph import read

    try:
        nodes = list(read(onnx_path).graph)
    except InvalidInputError:  # the message already states that the file cannot be read
        return ""
    mentioned = set(re.findall(r"[\w.]+", message))
    found = [node.name for node in nodes if f"{node.domain}.{node.op_type}".lstrip(".") in mentioned]
    return f", first in {found[0]!r}" if found else ""


def keep_concat_apart(model: Any) -> None:
    """Keep OpenVINO from moving a quantization in front of the Concat whose output it quantizes.

    OpenVINO 2026.4 does so where nothing else reads the Concat, then computes the next convolution as if
    the zero point of its unsigned input were 0: 10 dB from the right result. A maximum with the lowest
    float stops the move, and runs within the quantization's own kernel.
    """
    opset13 = import_silently("openvino").opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        above = op.input_value(0)
        while above.get_node().get_type_name() in _MOVES:
            above = above.get_node().input_value(0)
        if above.get_node().get_type_name() != "Concat":
            continue
        name = op.get_friendly_name()
        lowest = opset13.constant(-3.4028235e38, dtype="float32", name=f"{name}/lowest")
        barrier = opset13.maximum(op.input_value(0), lowest, name=f"{name}/barrier")
        op.input(0).replace_source_output(barrier.output(0))


def read_keys_as_they_are(model: Any) -> None:
    """Let a product take a matrix's rows for columns instead of transposing it.

    OpenVINO does so by itself only after it has merged the transposition with the one that splits heads, and
    then writes the keys out transposed.
    """
    opset13 = import_silently("openvino").opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "MatMul":
            continue
        right = op.input_value(1).get_node()
        options = op.get_attributes()
        if right.get_type_name() != "Transpose" or options["transpose_a"] or options["transpose_b"]:
            continue
        order = right.input_value(1).get_node()
        rank = right.get_output_partial_shape(0).rank
        if order.get_type_name() != "Constant" or rank.is_dynamic or rank.get_length() < 3:
            continue
        last = rank.get_length() - 1
        if list(order.get_data()) != [*range(last - 1), last, last - 1]:
            continue
        product = opset13.matmul(
            op.input_value(0), right.input_value(0), False, True, name=op.get_friendly_name()
        )
        for reader in list(op.output(0).get_target_inputs()):
            reader.replace_source_output(product.output(0))


def _statistics(model: Any) -> set[str]:
    """Names of the operations behind a reduction that have one number for each channel, or fewer.

    The reductions themselves are not among them: they read 16 bits, and sum and write 32.
    """
    found: set[str] = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() not in ("ReduceMean", "ReduceL2") or op.get_friendly_name() in found:
            continue
        most, waiting = _row_size(op), [op]
        while waiting:
            for reader in waiting.pop().output(0).get_target_inputs():
                node = reader.get_node()
                if node.get_friendly_name() not in found and _row_size(node) <= most:
                    found.add(node.get_friendly_name())
                    waiting.append(node)
    return found


def _row_size(op: Any) -> float:
    """Numbers that an operation computes for each row of the batch; infinite if unknown or the result."""
    if op.get_type_name() == "Result":
        return inf
    sizes = list(op.get_output_partial_shape(0))[1:]
    return inf if any(size.is_dynamic for size in sizes) else prod(size.get_length() for size in sizes)


def _keep_in_f32(path: Path, names: set[str]) -> None:
    """Mark operations of an IR as ones that stay in f32 where other floats become bf16.

    A variance is the difference of two numbers that may be nearly equal. OpenVINO has the mark, but its Python
    interface cannot set it.
    """
    from xml.etree import ElementTree

    tree = ElementTree.parse(path)  # noqa: S314 (OpenVINO has just written it)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") not in names:
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(1 if layer.find("data") is not None else 0, info)
        ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _name_deterministically(model: Any) -> None:
    """Replace the names that OpenVINO makes up from a counter of the whole process."""
    for index, op in enumerate(model.get_ordered_ops()):
        if op.get_friendly_name() == op.get_name():
            op.set_friendly_name(f"{op.get_type_name()}/{index}")
