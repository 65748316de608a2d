"""Fixes on more than their fixtures: other forms that are exact, and forms that they keep away from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdeploy.export.lint.report import LintReport
from qdeploy.export.lint.run import lint
from qdeploy.system.errors import InvalidInputError
from tests.export.lint.fixtures import CASES, CONV, HALF, WEIGHT, copied, good, graph, qdq, run


def mended(model: onnx.ModelProto, folder: Path, **options: str) -> tuple[LintReport, list[str]]:
    """The report after fixing, and the fixed graph's operators; what it computes has not changed."""
    onnx.save(model, folder / "before.onnx")
    report = lint(folder / "before.onnx", fix=folder / "after.onnx", **options)  # type: ignore[arg-type]
    for before, after in zip(run(folder / "before.onnx"), run(folder / "after.onnx"), strict=True):
        assert np.array_equal(before, after)
    return report, [node.op_type for node in onnx.load(folder / "after.onnx").graph.node]


# -- SignedCodes -------------------------------------------------------------------------------------------


def test_unsigned_weights_are_shifted(tmp_path: Path) -> None:
    model = graph(qdq("xd", "x", "s", "m") + "w = DequantizeLinear<axis=0>(unsigned, sw, middles) " + CONV)
    codes = np.random.default_rng(3).integers(0, 256, (16, 16, 3, 3)).astype(np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(codes, "unsigned"))
    model.graph.initializer.append(numpy_helper.from_array(np.full(16, 128, np.uint8), "middles"))
    report, _ = mended(model, tmp_path)
    assert report.passed
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "after.onnx").graph.initializer}
    assert np.array_equal(stored["unsigned.int8"], codes.astype(int) - 128)


def test_codes_around_another_number_stay(tmp_path: Path) -> None:
    report, _ = mended(graph(qdq("xd", "x", "s", "u") + WEIGHT + CONV), tmp_path)
    assert not report.fixed
    assert not report.passed


def test_unsigned_codes_that_are_read_as_such_stay(tmp_path: Path) -> None:
    """Another node reads the codes themselves."""
    body = qdq("xd", "x", "s", "m") + WEIGHT + CONV + " c = Cast<to=1>(xd_q)"
    report, _ = mended(graph(body, outputs="float[a,b,c,d] y, float[e,f,g,k] c"), tmp_path)
    assert "TRT002" not in report.fixed


# -- NamedCodes --------------------------------------------------------------------------------------------


def test_a_q_without_any_type_stays(tmp_path: Path) -> None:
    """By the standard it is uint8: to make it int8 would be another function."""
    body = "xq = QuantizeLinear(x, s) xd = DequantizeLinear(xq, s) " + WEIGHT + CONV
    report, _ = mended(graph(body), tmp_path)
    assert not report.fixed
    assert "TRT003" in {finding.rule for finding in report.findings}


# -- StoredCodes, StoredBias -------------------------------------------------------------------------------


def test_codes_round_half_to_even_and_saturate(tmp_path: Path) -> None:
    values = np.float32([[0.25, 0.75, -0.25, 1e9, -1e9, 0.0]] * 2) * np.float32(2)
    model = graph(
        "wq = QuantizeLinear<axis=0>(values, pair, zeros) w = DequantizeLinear<axis=0>(wq, pair, zeros) "
        "y = Add(x, w)",
        inputs="float[2,6] x",
        outputs="float[a,b] y",
    )
    constants = {"values": values, "pair": np.float32([1, 0.1]), "zeros": np.zeros(2, np.int8)}
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    _, operators = mended(model, tmp_path)
    assert operators == ["DequantizeLinear", "Add"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "after.onnx").graph.initializer}
    assert stored["values.codes"].tolist() == [[0, 2, 0, 127, -128, 0], [5, 15, -5, 127, -128, 0]]


def test_a_float_bias_behind_q_and_dq_is_stored(tmp_path: Path) -> None:
    body = qdq("xd", "x") + WEIGHT
    body += "bq = QuantizeLinear(b, t, z) bd = DequantizeLinear(bq, t, z) y = Conv<pads=[1,1,1,1]>(xd, w, bd)"
    report, operators = mended(graph(body), tmp_path)
    assert report.passed
    assert operators.count("DequantizeLinear") == 2


# -- StepsBeforeQuantizer ----------------------------------------------------------------------------------


def cast(scale: np.ndarray) -> onnx.ModelProto:
    body = "f = Cast<to=1>(x) xq = QuantizeLinear(f, own, z) xf = DequantizeLinear(xq, own, z) "
    body += "xd = Cast<to=10>(xf) w = DequantizeLinear<axis=0>(W8, swh, zw) "
    model = graph(body + "y = Conv<pads=[1,1,1,1]>(xd, w, bh)", **HALF)
    model.graph.initializer.append(numpy_helper.from_array(scale, "own"))
    return model


def test_a_scale_that_half_precision_holds_replaces_a_cast(tmp_path: Path) -> None:
    report, operators = mended(cast(np.float32(np.float16(0.05))), tmp_path)
    assert "TRT023" in report.fixed
    assert operators.count("Cast") == 1


def test_a_scale_that_it_does_not_hold_keeps_the_cast(tmp_path: Path) -> None:
    report, operators = mended(cast(np.float32(0.05)), tmp_path)
    assert "TRT023" not in report.fixed
    assert operators.count("Cast") == 2


def test_padding_with_another_number_stays_where_it_is(tmp_path: Path) -> None:
    model = graph(qdq("xd", "x") + WEIGHT + "p = Pad(xd, pads, two) y = Conv(p, w, b)")
    report, operators = mended(model, tmp_path)
    assert not report.fixed
    assert operators.index("Pad") > operators.index("QuantizeLinear")


def test_a_quantizer_that_others_read_stays_where_it_is(tmp_path: Path) -> None:
    body = qdq("xd", "x") + WEIGHT + "p = Pad(xd, pads) a = Conv(p, w, b) y = Add(a, xd)"
    report, _ = mended(graph(body), tmp_path)
    assert not report.fixed


# -- RepeatedPairs -----------------------------------------------------------------------------------------


def test_another_scale_is_no_repetition(tmp_path: Path) -> None:
    report, operators = mended(graph(qdq("xe", "x") + qdq("xd", "xe", "t") + WEIGHT + CONV), tmp_path)
    assert "TRT032" not in report.fixed
    assert operators.count("QuantizeLinear") == 2


# -- Folded ------------------------------------------------------------------------------------------------


def test_chains_fold_to_their_end(tmp_path: Path) -> None:
    """Shape, Gather, Concat, Reshape of a fixed shape leave only the Reshape."""
    body = (
        "n = Shape(x) i = Gather(n, first) j = Reshape(i, last) c = Concat<axis=0>(j, last) r = Reshape(x, c) "
        "y = Reshape(r, image)"
    )
    _, operators = mended(graph(body), tmp_path)
    assert operators == ["Reshape", "Reshape"]


def test_a_cast_that_loses_digits_stays(tmp_path: Path) -> None:
    """FLOAT to FLOAT16 and back rounds; FLOAT16 to FLOAT and back does not."""
    _, operators = mended(graph("h1 = Cast<to=10>(x) f = Cast<to=1>(h1) y = Tanh(f)"), tmp_path)
    assert operators == ["Cast", "Cast", "Tanh"]
    _, operators = mended(graph("f = Cast<to=1>(x) h1 = Cast<to=10>(f) y = Tanh(h1)", **HALF), tmp_path)
    assert operators == ["Tanh"]


def test_quantized_weights_are_not_folded(tmp_path: Path) -> None:
    """DQ of a constant is constant too, and the whole point."""
    _, operators = mended(good(), tmp_path)
    assert operators.count("DequantizeLinear") == 2


# -- all together ------------------------------------------------------------------------------------------


def test_fixes_build_on_each_other(tmp_path: Path) -> None:
    """A graph as ONNX Runtime's quantizer writes it, with some more against it."""
    body = (
        "i = Identity(x) "
        + qdq("xe", "i", "s", "m")
        + qdq("xf", "xe", "s", "m")
        + "p = Pad(xf, pads) wq = QuantizeLinear<axis=0>(Wf, sw, zw) w = DequantizeLinear<axis=0>(wq, sw, zw) "
        + "bd = DequantizeLinear<axis=0>(b32, sb, zb) y = Conv(p, w, bd)"
    )
    report, operators = mended(graph(body, ir=11), tmp_path, tensorrt="10.8")
    assert report.fixed.keys() == {"TRT002", "TRT019", "TRT023", "TRT032", "TRT033", "TRT044", "TRT046"}
    assert (report.counts["E"], report.counts["W"]) == (0, 0)
    assert sorted(operators) == ["Conv", "DequantizeLinear", "DequantizeLinear", "Pad", "QuantizeLinear"]


def test_the_source_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "before.onnx"
    onnx.save(
        copied(CASES["TRT033"].failing),
        path,
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    lint(path, fix=tmp_path / "after.onnx")
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
    (tmp_path / "weights").unlink()
    assert run(tmp_path / "after.onnx")


def test_what_is_no_valid_graph_is_not_written(tmp_path: Path) -> None:
    onnx.save(CASES["TRT009"].failing, tmp_path / "before.onnx")
    model = onnx.load(tmp_path / "before.onnx")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("colour", 1))
    onnx.save(model, tmp_path / "before.onnx")
    with pytest.raises(InvalidInputError, match="not valid ONNX"):
        lint(tmp_path / "before.onnx", fix=tmp_path / "after.onnx")
    assert not (tmp_path / "after.onnx").exists()
