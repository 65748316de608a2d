"""For every rule the smallest graph that breaks it, and its mended twin.

Graphs are text in ONNX's own notation; the large constants that a text names come from `CONSTANTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from tests.helpers import plain_options

_R = np.random.default_rng(0)


def _codes(*shape: int) -> np.ndarray:
    # Of seven bits: int8 kernels add their products exactly on processors without VNNI too.
    return _R.integers(-63, 64, shape).astype(np.int8)


def _floats(*shape: int) -> np.ndarray:
    return (_R.standard_normal(shape) / 8).astype(np.float32)


def _int4(*shape: int) -> np.ndarray:
    return _R.integers(-8, 8, shape).astype(np.int8).astype(ml_dtypes.int4)


_SCALES = np.linspace(0.01, 0.02, 16, dtype=np.float32)
_INT4 = _int4(16, 16, 3, 3)
CONSTANTS = {
    # Scales and zero points of activations: s, and t as another; h in 16 bits, u and m unsigned, e for fp8.
    "s": np.float32(0.05),
    "t": np.float32(0.02),
    "h": np.float16(0.05),
    "hsub": np.float16(1e-5),
    "z": np.int8(0),
    "z3": np.int8(3),
    "u": np.uint8(0),
    "m": np.uint8(128),
    "e": np.array(0, ml_dtypes.float8_e4m3fn),
    # A convolution of 16 to 16 channels, its scales, zero points and bias.
    "W8": _codes(16, 16, 3, 3),
    "Wf": _floats(16, 16, 3, 3),
    "Wh": _floats(16, 16, 3, 3).astype(np.float16),
    "W4": _INT4,
    "W4as8": _INT4.astype(np.int8),
    "We": _floats(16, 16, 3, 3).astype(ml_dtypes.float8_e4m3fn),
    "sw": _SCALES,
    "swh": _SCALES.astype(np.float16),
    "sw0": np.where(np.arange(16) == 3, 0, _SCALES).astype(np.float32),
    "sw8": _SCALES[:8],
    "zw": np.zeros(16, np.int8),
    "z1": np.zeros(1, np.int8),
    "b": _floats(16),
    "bh": _floats(16).astype(np.float16),
    "b32": _R.integers(-2000, 2000, 16).astype(np.int32),
    "sb": (_SCALES * np.float32(0.05)).astype(np.float32),
    "zb": np.zeros(16, np.int32),
    # Of 32 channels to 16, whole and in two halves; of 8 to 8.
    "W32": _codes(16, 32, 3, 3),
    "W16a": _codes(16, 16, 3, 3),
    "W16b": _codes(16, 16, 3, 3),
    "Wthin": _codes(8, 8, 3, 3),
    "Wthinf": _floats(8, 8, 3, 3),
    # Matrices (K, N) and their scales: per output channel, or by blocks along K.
    "M8": _codes(32, 32),
    "Mf": _floats(32, 32),
    "sm": np.linspace(0.01, 0.02, 32, dtype=np.float32),
    "zm": np.zeros(32, np.int8),
    "sblock": np.full((4, 32), 0.01, np.float32),
    "K96": _int4(96, 32),
    "K128": _int4(128, 32),
    "s2": np.full((2, 32), 0.01, np.float32),
    "s4": np.full((4, 32), 0.01, np.float32),
    "one8": np.ones(8, np.float32),
    "one16": np.ones(16, np.float32),
    "zero16": np.zeros(16, np.float32),
    "one4": np.ones(4, np.float32),
    "zero4": np.zeros(4, np.float32),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    "groups": np.array([1, 4, 256], np.int64),
    "image": np.array([1, 16, 8, 8], np.int64),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "tiny": np.float32(1e-5),
    "last": np.array([-1], np.int64),
    "first": np.int64(0),
}
IMAGE = "float[1,16,8,8]"


def graph(
    body: str,
    inputs: str = f"{IMAGE} x",
    outputs: str = "float[a,b,c,d] y",
    *,
    opset: int = 21,
    ir: int = 10,
    domains: str = "",
) -> onnx.ModelProto:
    """A model from text, with the constants that the text names."""
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]>'
    model = onnx.parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}")
    defined = {value.name for value in model.graph.input} | {
        x for node in model.graph.node for x in node.output
    }
    for name in dict.fromkeys(x for node in model.graph.node for x in node.input):
        if name in CONSTANTS and name not in defined:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(CONSTANTS[name]), name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return model


def qdq(name: str, source: str, scale: str = "s", zero: str = "z") -> str:
    """``name`` becomes ``source``, quantized and dequantized."""
    q = f"{name}_q"
    return f"{q} = QuantizeLinear({source}, {scale}, {zero}) {name} = DequantizeLinear({q}, {scale}, {zero}) "


WEIGHT = "w = DequantizeLinear<axis=0>(W8, sw, zw) "
CONV = "y = Conv<pads=[1,1,1,1]>(xd, w, b)"
GOOD = qdq("xd", "x") + WEIGHT + CONV


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model to change: even saving does, where it moves the weights out."""
    return onnx.ModelProto.FromString(model.SerializeToString())


@dataclass(frozen=True)
class Case:
    """A graph that breaks a rule, and its twin that breaks none.

    Attributes:
        options: what `lint` is called with, for both.
        lame: why ONNX Runtime does not run the failing one; empty if it does.
        spoil: what happens to the failing file after it is written.
    """

    failing: onnx.ModelProto
    twin: onnx.ModelProto
    options: dict[str, str] = field(default_factory=dict)
    lame: str = ""
    spoil: Callable[[Path], None] | None = None

    def write(self, model: onnx.ModelProto, path: Path) -> Path:
        """The model as a file; those that are spoilt have their weights beside them."""
        outside = {"save_as_external_data": True, "location": f"{path.name}_data", "size_threshold": 0}
        onnx.save(copied(model), path, **(outside if self.spoil else {}))  # type: ignore[arg-type]
        if self.spoil and model is self.failing:
            self.spoil(path)
        return path


def truncate(path: Path) -> None:
    data = path.with_name(f"{path.name}_data")
    data.write_bytes(data.read_bytes()[:-16])


def move_away(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../elsewhere"
    path.write_bytes(model.SerializeToString())


def good(**kwargs: object) -> onnx.ModelProto:
    return graph(GOOD, **kwargs)  # type: ignore[arg-type]


FLOAT_CONV = "y = Conv<pads=[1,1,1,1]>(x, Wf, b)"
HALF = {"inputs": "float16[1,16,8,8] x", "outputs": "float16[a,b,c,d] y"}
HALF_QDQ = qdq("xd", "x", "h") + "w = DequantizeLinear<axis=0>(W8, swh, zw) "
ROWS = {"inputs": "float[1,64,32] x", "outputs": "float[a,b,c] y"}
ROWS128 = {"inputs": "float[1,64,128] x", "outputs": "float[a,b,c] y"}
MATMUL = qdq("xd", "x") + "w = DequantizeLinear<axis=1>(M8, sm, zm) y = MatMul(xd, w)"
HEADS = {"inputs": "float[1,2,64,HEAD] q, float[1,2,HEAD,64] k, float[1,2,64,HEAD] v"}
TWO = {"inputs": f"{IMAGE} x, {IMAGE} v"}


def heads(size: int) -> dict[str, str]:
    return {"inputs": HEADS["inputs"].replace("HEAD", str(size))}


def attention(q: str = "q", k: str = "k", v: str = "v", softmax: str = "p", before: str = "") -> str:
    return (
        before
        + f"c = MatMul({q}, {k}) p = Softmax<axis=-1>(c) "
        + (
            f"y = MatMul({softmax}, {v})"
            if softmax == "p"
            else qdq("pd", "p", "s", "e") + f"y = MatMul(pd, {v})"
        )
    )


def two_convs(second: str) -> str:
    return second + " y = Add(y1, y2)"


CONV1 = "y1 = Conv<pads=[1,1,1,1]>(xd, w, b) "
BOTH = qdq("xd", "x") + qdq("vd", "v", "t")
SPLIT = (
    BOTH
    + "wa = DequantizeLinear<axis=0>(W16a, sw, zw) wb = DequantizeLinear<axis=0>(W16b, sw, zw) "
    + "ya = Conv<pads=[1,1,1,1]>(xd, wa, b) yb = Conv<pads=[1,1,1,1]>(vd, wb) y = Add(ya, yb)"
)
BEHIND = qdq("cd", "c") + "w = DequantizeLinear<axis=0>(W32, sw, zw) y = Conv<pads=[1,1,1,1]>(cd, w, b)"
NORM = "y = GroupNormalization<num_groups=4>(x, one16, zero16)"

CASES: dict[str, Case] = {
    "TRT001": Case(graph(qdq("xd", "x", "s", "z3") + WEIGHT + CONV), good()),
    "TRT002": Case(graph(qdq("xd", "x", "s", "m") + WEIGHT + CONV), good()),
    "TRT003": Case(
        graph("xq = QuantizeLinear<output_dtype=3>(x, s) xd = DequantizeLinear(xq, s, z) " + WEIGHT + CONV),
        good(),
    ),
    "TRT004": Case(graph(qdq("xd", "x") + WEIGHT.replace("sw", "sw0") + CONV), good()),
    "TRT005": Case(graph(qdq("xd", "x", "given") + WEIGHT + CONV, inputs=f"{IMAGE} x, float given"), good()),
    "TRT006": Case(
        graph(qdq("xd", "x") + "w = DequantizeLinear<axis=0>(W8, sw8) " + CONV), good(), lame="checks it too"
    ),
    "TRT007": Case(graph(qdq("xd", "x", "sw", "zw") + WEIGHT + CONV), good()),
    "TRT008": Case(graph(qdq("xd", "x") + "w = DequantizeLinear(W8, sw, zw) " + CONV), good()),
    "TRT009": Case(graph(qdq("xd", "x") + WEIGHT.replace("zw", "z1") + CONV), good(), lame="checks it too"),
    "TRT010": Case(
        graph(
            "xq = QuantizeLinear(x, h, z) xd = DequantizeLinear(xq, s, z) " + WEIGHT + CONV, opset=23, ir=11
        ),
        good(opset=23, ir=11),
        lame="has no kernel for it",
    ),
    "TRT011": Case(
        graph(
            "a = Conv<pads=[1,1,1,1]>(x, Wh, bh) aq = QuantizeLinear(a, h, z) ad = DequantizeLinear(aq, s, z) "
            + WEIGHT
            + "c = Conv<pads=[1,1,1,1]>(ad, w, b) d = Cast<to=10>(c) y = Relu(d)",
            **HALF,
        ),
        graph(
            "a = Conv<pads=[1,1,1,1]>(x, Wh, bh) "
            + HALF_QDQ.replace("(x,", "(a,")
            + "c = Conv<pads=[1,1,1,1]>(xd, w, bh) y = Relu(c)",
            **HALF,
        ),
    ),
    "TRT012": Case(
        graph(
            qdq("xd", "x") + "w = DequantizeLinear<axis=0, block_size=8>(M8, sblock) y = MatMul(xd, w)",
            **ROWS,
        ),
        graph(MATMUL, **ROWS),
    ),
    "TRT013": Case(
        graph(
            "w = DequantizeLinear<axis=0, block_size=64>(K96, s2) y = MatMul(x, w)",
            inputs="float[1,64,96] x",
            outputs="float[a,b,c] y",
        ),
        graph("w = DequantizeLinear<axis=0, block_size=64>(K128, s2) y = MatMul(x, w)", **ROWS128),
    ),
    "TRT014": Case(
        graph("w = DequantizeLinear<axis=0, block_size=32>(K128, s4) y = MatMul(x, w)", **ROWS128),
        graph("w = DequantizeLinear<axis=0, block_size=64>(K128, s2) y = MatMul(x, w)", **ROWS128),
    ),
    "TRT015": Case(
        graph(qdq("xd", "x") + "w = DequantizeLinear<axis=0>(W4, sw) " + CONV),
        graph(qdq("xd", "x") + "w = DequantizeLinear<axis=0>(W4as8, sw) " + CONV),
    ),
    "TRT048": Case(good(), good(), lame="its weights are in another folder", spoil=move_away),
    "TRT047": Case(
        graph(
            qdq("xd", "x") + "w = DequantizeLinear<axis=0, block_size=64>(K128, s2) y = MatMul(xd, w)",
            **ROWS128,
        ),
        graph("w = DequantizeLinear<axis=0, block_size=64>(K128, s2) y = MatMul(x, w)", **ROWS128),
    ),
    "TRT016": Case(good(opset=23, ir=10), good(), {"tensorrt": "10.8"}),
    "TRT017": Case(
        graph(GOOD.replace("QuantizeLinear(x", "QuantizeLinear<precision=1>(x"), opset=23, ir=11),
        good(opset=23, ir=11),
    ),
    "TRT018": Case(
        graph(
            "xq, xs, xz = DynamicQuantizeLinear(x) c = MatMulInteger(xq, M8, xz) d = Cast<to=1>(c) y = Mul(d, xs)",
            **ROWS,
        ),
        graph(MATMUL, **ROWS),
    ),
    "TRT019": Case(
        graph(
            qdq("xd", "x") + WEIGHT + "bd = DequantizeLinear<axis=0>(b32, sb, zb) "
            "y = Conv<pads=[1,1,1,1]>(xd, w, bd)"
        ),
        good(),
    ),
    "TRT020": Case(graph("y = com.microsoft.Gelu(x)", domains=', "com.microsoft" : 1'), graph("y = Gelu(x)")),
    "TRT021": Case(
        graph("d = Cast<to=11>(x) r = Tanh(d) y = Cast<to=1>(r)"),
        graph("y = Tanh(x)"),
    ),
    "TRT022": Case(graph(WEIGHT + "y = Conv<pads=[1,1,1,1]>(x, w, b)"), good()),
    "TRT023": Case(
        graph(qdq("xd", "x") + WEIGHT + "p = Pad(xd, pads) y = Conv(p, w, b)"),
        graph("p = Pad(x, pads) " + qdq("xd", "p") + WEIGHT + "y = Conv(xd, w, b)"),
    ),
    "TRT024": Case(
        graph(
            "r = Tanh(x) "
            + qdq("xd", "r")
            + "w = DequantizeLinear<axis=0>(Wthin, sw8) y = Conv<pads=[1,1,1,1]>(xd, w)",
            inputs="float[1,8,8,8] x",
        ),
        graph("r = Tanh(x) y = Conv<pads=[1,1,1,1]>(r, Wthinf)", inputs="float[1,8,8,8] x"),
    ),
    "TRT025": Case(
        graph(MATMUL, inputs="float[1,32] x", outputs="float[a,b] y"),
        graph("y = MatMul(x, Mf)", inputs="float[1,32] x", outputs="float[a,b] y"),
    ),
    "TRT026": Case(
        graph(attention("qd", "kd", before=qdq("qd", "q") + qdq("kd", "k", "t")), **heads(40)),
        graph(attention(), **heads(40)),
    ),
    "TRT027": Case(
        graph(attention("qd", "kd", before=qdq("qd", "q", "s", "e") + qdq("kd", "k", "t", "e")), **heads(32)),
        graph(
            attention(
                *("qd", "kd", "vd", "pd"),
                before=qdq("qd", "q", "s", "e") + qdq("kd", "k", "t", "e") + qdq("vd", "v", "t", "e"),
            ),
            **heads(32),
        ),
    ),
    "TRT028": Case(
        graph(qdq("xd", "x") + WEIGHT + CONV1 + qdq("yd", "y1", "t") + "y = Add(yd, x)"),
        graph(qdq("xd", "x") + WEIGHT + CONV1 + "y = Add(y1, xd)"),
    ),
    "TRT029": Case(
        graph(BOTH + "c = Concat<axis=1>(xd, vd) " + BEHIND, **TWO),
        graph(qdq("xd", "x") + qdq("vd", "v") + "c = Concat<axis=1>(xd, vd) " + BEHIND, **TWO),
    ),
    "TRT030": Case(
        graph(
            two_convs(
                qdq("xd", "x") + qdq("xe", "x", "t") + WEIGHT + CONV1 + "y2 = Conv<pads=[1,1,1,1]>(xe, w)"
            )
        ),
        graph(two_convs(qdq("xd", "x") + WEIGHT + CONV1 + "y2 = Conv<pads=[1,1,1,1]>(xd, w)")),
    ),
    "TRT031": Case(graph(qdq("xd", "x") + NORM.replace("(x", "(xd")), graph(NORM)),
    "TRT032": Case(graph(qdq("xe", "x") + qdq("xd", "xe") + WEIGHT + CONV), good()),
    "TRT033": Case(
        graph(
            qdq("xd", "x")
            + "wq = QuantizeLinear<axis=0>(Wf, sw, zw) w = DequantizeLinear<axis=0>(wq, sw, zw) "
            + CONV
        ),
        good(),
    ),
    "TRT034": Case(
        graph(
            "xh = Cast<to=10>(x) " + HALF_QDQ.replace("(x,", "(xh,") + "y = Conv<pads=[1,1,1,1]>(xd, w, bh)",
            outputs="float16[a,b,c,d] y",
        ),
        graph(HALF_QDQ + "y = Conv<pads=[1,1,1,1]>(xd, w, bh)", **HALF),
    ),
    "TRT035": Case(
        graph("a = Add(x, v) y = Tanh(a)", inputs="float[N,16,8,8] x, float[M,16,8,8] v"),
        graph("a = Add(x, v) y = Tanh(a)", inputs="float[N,16,8,8] x, float[1,16,8,8] v"),
        {"shapes": "x:1x16x8x8,2x16x8x8,4x16x8x8"},
    ),
    "TRT036": Case(good(), good(), lame="its data file is too short", spoil=truncate),
    "TRT037": Case(
        graph("l = SequenceConstruct(x, x) a = SequenceAt(l, first) y = Tanh(a)"), graph("y = Tanh(x)")
    ),
    "TRT038": Case(
        graph("r = Reshape(x, groups) n = InstanceNormalization(r, one4, zero4) y = Reshape(n, image)"),
        graph(NORM),
    ),
    "TRT039": Case(
        graph(
            "mean = ReduceMean(x, last) c = Sub(x, mean) q = Pow(c, two) var = ReduceMean(q, last) "
            "v = Add(var, tiny) d = Sqrt(v) n = Div(c, d) y = Mul(n, half)"
        ),
        graph("n = LayerNormalization<axis=-1>(x, one8) y = Mul(n, half)"),
    ),
    "TRT040": Case(
        graph("c = MatMul(q, k) d = Mul(c, half) p = Softmax<axis=-1>(d) y = MatMul(p, v)", **heads(32)),
        graph(attention("qs", before="qs = Mul(q, half) "), **heads(32)),
    ),
    "TRT041": Case(
        graph(HALF_QDQ.replace(" h,", " hsub,") + "y = Conv<pads=[1,1,1,1]>(xd, w, bh)", **HALF),
        graph(HALF_QDQ + "y = Conv<pads=[1,1,1,1]>(xd, w, bh)", **HALF),
    ),
    "TRT042": Case(good(), graph(FLOAT_CONV), {"compute_capability": "7.0"}),
    "TRT043": Case(graph(FLOAT_CONV), good()),
    "TRT044": Case(
        graph(
            "i = Identity(x) c = Mul(half, two) a = Mul(i, c) f = Cast<to=1>(a) "
            + GOOD.replace("QuantizeLinear(x,", "QuantizeLinear(f,")
        ),
        good(),
    ),
    "TRT045": Case(
        graph(
            two_convs(
                qdq("xd", "x")
                + qdq("vd", "v", "s", "e")
                + WEIGHT
                + "we = DequantizeLinear<axis=0>(We, sw) "
                + CONV1
                + "y2 = Conv<pads=[1,1,1,1]>(vd, we)"
            ),
            **TWO,
        ),
        graph(
            two_convs(qdq("xd", "x") + qdq("vd", "v") + WEIGHT + CONV1 + "y2 = Conv<pads=[1,1,1,1]>(vd, w)"),
            **TWO,
        ),
    ),
    "TRT046": Case(good(ir=11), good(), {"tensorrt": "10.8"}),
    "OV001": Case(
        graph(
            BOTH
            + "c = Concat<axis=1>(xd, vd) w = DequantizeLinear<axis=0>(W32, sw, zw) "
            + "y = Conv<pads=[1,1,1,1]>(c, w, b)",
            **TWO,
        ),
        graph(SPLIT, **TWO),
        {"target": "openvino"},
    ),
}


def run(path: Path) -> list[np.ndarray]:
    """What ONNX Runtime computes, unoptimized, on inputs that depend on nothing but their shapes."""
    options = plain_options()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(5)
    feed = {}
    for port in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in port.shape]
        kind = np.float16 if port.type == "tensor(float16)" else np.float32
        feed[port.name] = np.asarray(generator.normal(size=shape)).astype(kind)
    outputs: list[np.ndarray] = session.run(None, feed)
    return outputs
