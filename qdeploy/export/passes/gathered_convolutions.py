"""Quantized convolutions as one integer product over gathered pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.operands import Operands, operands
from qdeploy.export.graph.writer import Writer
from qdeploy.export.passes.integer_products import integer_product

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class GatheredConvolutions(InPlacePass):
    """A convolution of dequantized uint8 codes becomes a Gather of pixels and a MatMulIntegerToFloat.

    ONNX Runtime's only fast int8 convolution quantizes its output, which nobody calibrated. The product of
    gathered pixels [rows, positions, kernel * in] and the weight [kernel * in, out] computes the same 32-bit sums
    and returns them as floats. A Gather along the pixels of a channels-last tensor copies whole channel vectors.

    1. The operands are those of `qdeploy.export.graph.operands.operands`; the convolution has one group, two
       spatial axes of known size, and no ``auto_pad``.
    2. Kernels of one pixel with stride 1 need no Gather: the product reads the tensor as it is.
    3. Otherwise one pixel that holds the zero point is appended to the pixels if the kernel leaves the image, and
       the indices of the Gather are a constant.
    4. A Pad with zeros or a Resize to the nearest pixel before the quantizer is merged into the indices:
       quantization commutes with both.
    5. Transpositions to channels-last in front and back behind are left to `SunkTranspositions`.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Conv" and node.domain == "":
                modified |= _rewrite(model, node)
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Geometry:
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...]) -> _Geometry:
        def ints(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(node.attributes.get_ints(name, default))

        return cls(kernel, ints("strides", (1, 1)), ints("pads", (0, 0, 0, 0)), ints("dilations", (1, 1)))

    @property
    def pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.pads)

    def indices(self, grid: np.ndarray) -> np.ndarray:
        """Which entry of a grid [height, width] each output position's kernel reads; -1 outside.

        Returns:
            [height of the output, width of the output, kernel height * kernel width].
        """
        padded = np.pad(
            grid, ((self.pads[0], self.pads[2]), (self.pads[1], self.pads[3])), constant_values=-1
        )
        reach = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach)
        windows = windows[:: self.strides[0], :: self.strides[1], :: self.dilations[0], :: self.dilations[1]]
        return windows.reshape(*windows.shape[:2], -1)


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    found = operands(node, 0)
    image = _size(node.inputs[0])
    group = node.attributes.get_int("group", 1)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if found is None or found.weight.ndim != 4 or image is None or group != 1:
        return False
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias is None:
        return False
    geometry = _Geometry.of(node, found.weight.shape[2:])
    write = Writer(model, node)
    rows, channels = node.inputs[0].shape[0], found.weight.shape[1]  # type: ignore[index, union-attr]
    codes, grid = _source(write, found, image)
    height, width = _size(codes) or image
    last = write.node(
        "Transpose", codes, shape=(rows, height, width, channels), dtype=codes.dtype, perm=list(TO_LAST)
    )
    features = found.weight.shape[0]
    if geometry.pointwise and grid is None:
        weight = found.weight.reshape(features, channels).T
        result = integer_product(write, found, last, weight, bias, [rows, height, width, features])
        output = (height, width)
    else:
        if grid is None:
            grid = np.arange(height * width).reshape(height, width)
        indices = geometry.indices(grid)
        output = indices.shape[:2]
        gathered = _gather(write, found, last, indices, (rows, height * width, channels))
        weight = found.weight.transpose(2, 3, 1, 0).reshape(-1, features)
        result = integer_product(
            write, found, gathered, weight, bias, [rows, output[0] * output[1], features]
        )
        shape = write.constant(np.array([0, *output, features]), "shape")
        result = write.node("Reshape", result, shape, shape=(rows, *output, features))
    first = write.node("Transpose", result, shape=(rows, features, *output), perm=list(TO_FIRST))
    write.replace(node.outputs[0], first)
    return True


def _gather(
    write: Writer, found: Operands, last: ir.Value, indices: np.ndarray, shape: tuple[object, int, int]
) -> ir.Value:
    """The pixels under the kernel at each output position, [rows, positions, kernel * channels]."""
    rows, pixels, channels = shape
    flat = write.constant(np.array([0, pixels, channels]), "shape")
    codes = write.node("Reshape", last, flat, shape=shape, dtype=last.dtype)
    if (indices < 0).any():
        behind = write.constant(np.array([0, 0, 0, 0, 1, 0]), "pads")
        codes = write.node(
            "Pad", codes, behind, found.zero_point, shape=(rows, pixels + 1, channels), dtype=last.dtype
        )
        indices = np.where(indices < 0, pixels, indices)
    positions, taps = indices.shape[0] * indices.shape[1], indices.shape[2]
    numbers = write.constant(indices.reshape(-1).astype(np.int32), "indices")
    gathered = write.node(
        "Gather", codes, numbers, shape=(rows, positions * taps, channels), dtype=last.dtype, axis=1
    )
    merged = write.constant(np.array([0, positions, taps * channels]), "shape")
    return write.node("Reshape", gathered, merged, shape=(rows, positions, taps * channels), dtype=last.dtype)


def _source(write: Writer, found: Operands, image: tuple[int, int]) -> tuple[ir.Value, np.ndarray | None]:
    """Codes from before a Pad or Resize, and where each pixel of the image lies in them (-1: outside).

    Returns:
        The codes as they are, and None, where there is nothing to skip.
    """
    quantizer = found.quantizer
    before = producer(quantizer.inputs[0]) if quantizer is not None else None
    if quantizer is None or before is None:
        return found.codes, None
    source = before.inputs[0]
    small = _size(source)
    if small is None or source is None:
        return found.codes, None
    grid = np.arange(small[0] * small[1]).reshape(small)
    if before.op_type == "Pad":
        padded = _padded(before, grid)
    elif before.op_type == "Resize":
        padded = _enlarged(before, grid, image)
    else:
        return found.codes, None
    if padded is None or padded.shape != image:
        return found.codes, None
    codes = write.node(
        "QuantizeLinear", source, *quantizer.inputs[1:], shape=source.shape, dtype=found.codes.dtype
    )
    return codes, padded


def _padded(node: ir.Node, grid: np.ndarray) -> np.ndarray | None:
    """A grid of pixels as a Pad of zeros makes it, -1 where there was nothing."""
    pads = constant(node.inputs[1])
    value = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant" or pads is None or len(pads) != 8 or (value is not None and value.any()):
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and value is None:
        return None
    if len(node.inputs) > 3 or any(pads[[0, 1, 4, 5]]) or (pads < 0).any():
        return None
    return np.pad(grid, ((pads[2], pads[6]), (pads[3], pads[7])), constant_values=-1)


def _enlarged(node: ir.Node, grid: np.ndarray, image: tuple[int, int]) -> np.ndarray | None:
    """A grid of pixels as a Resize to the nearest pixel repeats them, by whole factors."""
    text = node.attributes.get_string
    factors = [large // small for large, small in zip(image, grid.shape, strict=True)]
    if any(small * f != large for small, f, large in zip(grid.shape, factors, image, strict=True)):
        return None
    if text("mode", "nearest") != "nearest" or text("nearest_mode", "round_prefer_floor") != "floor":
        return None
    if text("coordinate_transformation_mode", "half_pixel") != "asymmetric":
        return None
    return grid.repeat(factors[0], 0).repeat(factors[1], 1)


def _size(value: ir.Value | None) -> tuple[int, int] | None:
    """Height and width of [rows, channels, height, width], if they are known."""
    if value is None or value.shape is None or value.shape.rank() != 4:
        return None
    height, width = value.shape[2], value.shape[3]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
