"""The inspector's two schemas, by examples in the words of TensorRT 10 and 11."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qdeploy.engines.int8_share import int8_mac_share
from qdeploy.engines.tensorrt.inspector import dtype, kernels, parse_layers, report
from qdeploy.system.errors import InvalidInputError

INT8_10 = {"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}
HALF_10 = {"Name": "x", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}
INT8_11 = {"Name": "x", "Format": "NC/32HW32", "Datatype": "Int8"}
HALF_11 = {"Name": "x", "Format": "NHWC8", "DataType": "Half"}


def layer(kind: str, inputs: list[dict[str, str]], origin: list[str], **more: Any) -> dict[str, Any]:
    metadata = "\x1e".join(f"[ONNX Layer: {name}]" for name in origin)
    return {
        "Name": " + ".join(origin),
        "LayerType": kind,
        "Inputs": inputs,
        "Outputs": [],
        "Metadata": metadata,
        **more,
    }


def told(int8: dict[str, str], half: dict[str, str], **more: Any) -> str:
    layers = [
        layer("Reformat", [half], ["sample"]),
        layer("CaskConvolution", [int8], ["down.conv", "down.act/dq"], ParameterType="Convolution",
              TacticName="sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32"),
        layer("CaskConvolution", [half], ["mid.conv"], ParameterType="Convolution", TacticName="f16f16"),
        layer("kgen", [int8, half], ["up.to_q/MatMul", "up.to_q/Add"], TacticName="sm80_gemm_int8"),
        layer("kgen", [half], ["norm"], TacticName="__myl_MeanMul"),
    ]  # fmt: skip
    return json.dumps({"Layers": layers, **more})


SCHEMAS = {
    "10": told(INT8_10, HALF_10, Bindings=["sample", "out_sample"]),
    "11": told(
        INT8_11, HALF_11, **{"I/O Tensors": [{"Name": "sample", "IOMode": "Input", "DataType": "Float"}]}
    ),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_both_schemas_tell_the_same(schema: str) -> None:
    layers = parse_layers(SCHEMAS[schema])
    found = report(layers, dict.fromkeys(("down.conv", "mid.conv", "up.to_q/MatMul", "gone"), "int8"))
    assert found == {
        "planned": 4,
        "as_planned": 2,
        "kinds": {"int8": 2},
        "in_other": {},
        "products": {"f16": 1, "int8": 2},
        "in_float": {"mid.conv": "f16 f16f16"},
        "not_found": ["gone"],
        "reformats": 1,
        "detailed": True,
    }


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_share_of_macs_comes_from_these_kernels(schema: str) -> None:
    macs = {"down.conv": 300, "mid.conv": 100, "up.to_q/MatMul": 100}
    shares = int8_mac_share(kernels(parse_layers(SCHEMAS[schema])), macs, set(macs))
    assert shares == {"int8_mac_share": 0.8, "int8_mac_share_of_meant": 0.8}


def test_a_plan_without_details_is_told_apart() -> None:
    layers = parse_layers('{"Layers": ["down.conv + relu", "mid.conv"], "Bindings": ["x"]}')
    found = report(layers, {"down.conv": "int8"})
    assert found["detailed"] is False
    assert found["not_found"] == ["down.conv"]
    assert kernels(layers)[0].layers == ("down.conv", "relu")


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"Bindings": []}'])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="inspector"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (INT8_10, "int8"), (HALF_10, "f16"), (INT8_11, "int8"), (HALF_11, "f16"),
        ({"Datatype": "FP8"}, "fp8"), ({"Datatype": "BFloat16"}, "bf16"), ({"Datatype": "Float"}, "f32"),
        ({"Format/Datatype": "Row major linear FP32"}, "f32"), ({"Datatype": "Int4"}, "int4"), ({}, ""),
    ],
)  # fmt: skip
def test_types_are_read_from_either_field(tensor: dict[str, str], name: str) -> None:
    assert dtype(tensor) == name
