"""The graphs of the self test: each pattern that an exported denoiser has, as small as it can be.

There are channels enough for engines to have int8 and int4 kernels. Every graph takes ``sample``
``[batch, 128, 8, 8]`` and ``timestep``, and is written per format: weights as codes behind DequantizeLinear,
activations through Q/DQ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

CHANNELS, SIZE = 128, 8
OPSET = 21
BLOCK = 64  # int4 weights: rows that share a scale; engines have kernels for 64 and 128


@dataclass(frozen=True)
class GraphFormat:
    """How the layers of a graph are quantized.

    Attributes:
        name: the word in reports.
        weights: type of weights, as onnx calls it; None for float.
        activations: type of activations; None for float.
        limit: the largest code.
        patterns: the patterns that exist in it; None for all.
        weights_limit: the largest code of weights, where it is another; 0 for the same.
    """

    name: str
    weights: str | None = None
    activations: str | None = None
    limit: int = 1
    patterns: tuple[str, ...] | None = None
    weights_limit: int = 0


FORMATS = {
    found.name: found
    for found in (
        GraphFormat("fp32"),
        GraphFormat("int8", "INT8", "INT8", 127),
        # What int8 kernels of processors without VNNI can add (`qdeploy.export.passes.narrow_sums`).
        GraphFormat("int7", "INT8", "INT8", 127, weights_limit=63),
        # Weights alone, in blocks, for GEMMs: what TensorRT's int4 is for.
        GraphFormat("int4", "INT4", None, 7, ("gemm",)),
        GraphFormat("fp8", "FLOAT8E4M3FN", "FLOAT8E4M3FN", 448, ("gemm", "conv")),
    )
}


class Builder:
    """Collects nodes and initializers of a graph.

    Args:
        kind: how its layers are quantized.
    """

    def __init__(self, kind: GraphFormat) -> None:
        import numpy as np

        self.kind = kind
        self.random: np.random.Generator = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node; returns the name of its output."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def constant(self, name: str, value: Any, kind: str = "FLOAT") -> str:
        """An initializer; returns its name."""
        import numpy as np
        from onnx import TensorProto, helper

        array = np.asarray(value, np.float32)
        flat = (
            array.flatten() if kind == "FLOAT" or kind.startswith("FLOAT8") else array.astype(int).flatten()
        )
        self.initializers.append(helper.make_tensor(name, getattr(TensorProto, kind), array.shape, flat))
        return name

    def activation(self, x: str, name: str, scale: float | None = None) -> str:
        """Q/DQ on an activation, where the format has it."""
        kind = self.kind.activations
        if kind is None:
            return x
        step = self.constant(f"{name}.scale", 4.0 / self.kind.limit if scale is None else scale)
        zero = self.constant(f"{name}.zero", 0, kind)
        codes = self.add("QuantizeLinear", [x, step, zero], f"{name}/q")
        return self.add("DequantizeLinear", [codes, step, zero], f"{name}/dq")

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        """A random weight, as codes per channel (int4: per block of rows) behind DequantizeLinear."""
        import numpy as np

        value = self.random.standard_normal(shape) / np.sqrt(np.prod(shape) / shape[axis])
        kind, limit = self.kind.weights, self.kind.weights_limit or self.kind.limit
        if kind is None:
            return self.constant(name, value)
        if kind == "INT4":
            blocks = value.reshape(shape[0] // BLOCK, BLOCK, shape[1])
            step = np.abs(blocks).max(1) / limit
            codes = np.rint(blocks / step[:, None]).reshape(shape)
            where: dict[str, int] = {"axis": 0, "block_size": BLOCK}
        else:
            others = tuple(other for other in range(len(shape)) if other != axis)
            step = np.abs(value).max(others) / limit
            along = [-1 if other == axis else 1 for other in range(len(shape))]
            codes = value / step.reshape(along)
            codes, where = (np.rint(codes) if kind == "INT8" else codes), {"axis": axis}
        names = [
            self.constant(f"{name}.codes", codes, kind),
            self.constant(f"{name}.scale", step),
            self.constant(f"{name}.zero", np.zeros(step.shape), kind),
        ]
        return self.add("DequantizeLinear", names, f"{name}/dq", **where)

    def conv(self, x: str, name: str, inputs: int = CHANNELS, quantize: bool = True) -> str:
        """A 3x3 convolution with bias."""
        bias = self.constant(f"{name}.bias", self.random.standard_normal(CHANNELS) * 0.1)
        x = self.activation(x, f"{name}.act") if quantize else x
        weight = self.weight(f"{name}.weight", (CHANNELS, inputs, 3, 3), 0)
        return self.add("Conv", [x, weight, bias], name, pads=[1, 1, 1, 1])


def conv(g: Builder) -> str:
    """A convolution, an activation function, a convolution."""
    x = g.conv("sample", "conv1")
    x = g.add("Mul", [x, g.add("Sigmoid", [x], "sigmoid")], "silu")
    return g.conv(x, "conv2")


def gemm(g: Builder) -> str:
    """A linear layer on pixels."""
    x = g.add("Transpose", ["sample"], "to_last", perm=[0, 2, 3, 1])
    weight = g.weight("linear.weight", (CHANNELS, CHANNELS), 1)
    x = g.add("MatMul", [g.activation(x, "linear.act"), weight], "linear")
    bias = g.constant("linear.bias", g.random.standard_normal(CHANNELS) * 0.1)
    return g.add("Transpose", [g.add("Add", [x, bias], "biased")], "to_first", perm=[0, 3, 1, 2])


def concat(g: Builder) -> str:
    """A convolution of a shortcut and the main branch under one scale."""
    joined = g.add("Concat", [g.conv("sample", "conv1"), "sample"], "concat", axis=1)
    return g.conv(joined, "conv2", 2 * CHANNELS)


def residual(g: Builder) -> str:
    """A convolution added to its own input."""
    return g.add("Add", [g.conv("sample", "conv1"), "sample"], "residual")


def split_shortcut(g: Builder) -> str:
    """Two convolutions with scales of their own and a sum, in the place of Concat."""
    main = g.conv("sample", "conv1")
    left = g.conv(main, "half1")
    right = g.activation("sample", "half2.act", scale=8.0 / g.kind.limit)
    weight = g.weight("half2.weight", (CHANNELS, CHANNELS, 3, 3), 0)
    return g.add("Add", [left, g.add("Conv", [right, weight], "half2", pads=[1, 1, 1, 1])], "sum")


def hoisted_scale(g: Builder) -> str:
    """A scale that depends on the timestep, in front of Q/DQ of a constant scale and behind the convolution."""
    rate = g.add("Exp", [g.add("Mul", ["timestep", g.constant("rate", -0.001)], "slowly")], "ratio")
    x = g.activation(g.add("Div", ["sample", rate], "hoisted"), "conv.act")
    x = g.add("Conv", [x, g.weight("conv.weight", (CHANNELS, CHANNELS, 3, 3), 0)], "conv", pads=[1, 1, 1, 1])
    bias = g.constant("conv.bias", g.random.standard_normal((CHANNELS, 1, 1)) * 0.1)
    return g.add("Add", [g.add("Mul", [x, rate], "lowered"), bias], "biased")


PATTERNS: dict[str, Callable[[Builder], str]] = {
    function.__name__: function for function in (conv, gemm, concat, residual, split_shortcut, hoisted_scale)
}


def model(pattern: str, kind: GraphFormat) -> Any:
    """A pattern as an ONNX model.

    Args:
        pattern: a name of `PATTERNS`.
        kind: how it is quantized.

    Returns:
        The model; inputs ``sample`` ``[batch, 128, 8, 8]`` and a scalar ``timestep``, which every graph reads.
    """
    from onnx import TensorProto, helper

    g = Builder(kind)
    output = PATTERNS[pattern](g)
    # A graph that does not read the timestep would lose that input on the way.
    drift = g.add("Mul", ["timestep", g.constant("drift.rate", 1e-4)], "drift")
    g.nodes.append(helper.make_node("Add", [output, drift], ["out_sample"], name="out"))
    shape: list[str | int | None] = ["batch", CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        g.nodes,
        pattern,
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        g.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
