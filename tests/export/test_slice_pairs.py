"""The exporter's rule for pairs of slices finds the same pairs, and does not walk the graph for every node."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import slice_split_rule

from qdeploy.export.slice_pairs import has_sibling, quick_slice_pairs


def graph(begins: tuple[int, int], plain: int = 0) -> ir.Model:
    """Two slices of 4 features of one tensor, behind some additions; and a lone slice of another."""
    chain = "\n".join(f"x{number + 1} = Add (x{number}, x{number})" for number in range(plain))
    (low, high), last = begins, f"x{plain}"
    return ir.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x0) => (float[2, 4] y, float[2, 4] z, float[2, 2] lone)
        <int64[1] axis = {{-1}}, int64[1] b0 = {{{low}}}, int64[1] e0 = {{{low + 4}}},
         int64[1] b1 = {{{high}}}, int64[1] e1 = {{{high + 4}}}, int64[1] two = {{2}}> {{
            {chain}
            first = Slice ({last}, b0, e0, axis)
            other = Neg ({last})
            lone = Slice (other, b0, two, axis)
            second = Slice ({last}, b1, e1, axis)
            y = Neg (first)
            z = Neg (second)
        }}""")
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def rewritten(model: ir.Model, quick: bool) -> list[str]:
    if quick:
        with quick_slice_pairs():
            RewritePass([slice_split_rule])(model)
    else:
        RewritePass([slice_split_rule])(model)
    return operators(model)


def test_halves_of_a_tensor_become_a_split_as_without_it() -> None:
    for begins in ((0, 4), (4, 0), (0, 2)):
        quick, plain = (rewritten(graph(begins, 2), quick) for quick in (True, False))
        assert quick == plain
    # The rule pairs a slice with the first one of its tensor alone: halves count if the upper one comes first.
    assert "Split" in rewritten(graph((4, 0)), quick=True)
    assert "Split" not in rewritten(graph((0, 2)), quick=True)


def test_only_slices_that_share_their_input_are_matched() -> None:
    model, seen = graph((0, 2), plain=50), []
    assert [node.op_type for node in model.graph if has_sibling(node)] == ["Slice", "Slice"]
    match = slice_split_rule.match

    def counted(*arguments: object, **options: object) -> object:
        seen.append(arguments[2])
        return match(*arguments, **options)

    slice_split_rule.match = counted
    try:
        rewritten(model, quick=True)
    finally:
        del slice_split_rule.match
    assert len(seen) == 2


def test_the_rule_is_put_back() -> None:
    before = slice_split_rule.try_rewrite
    with quick_slice_pairs():
        assert slice_split_rule.try_rewrite != before
    assert slice_split_rule.try_rewrite == before
