from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import Result
from onnx.reference import ReferenceEvaluator

from qdeploy.engines.onnxruntime import ONNXRuntimeEngine
from qdeploy.engines.registry import Backend, backends
from qdeploy.engines.selftest.graphs import FORMATS, PATTERNS, model
from qdeploy.engines.selftest.run import example, oracle, selftest
from qdeploy.export.macs import meant_int8
from qdeploy.system.decibels import sqnr_db
from qdeploy.system.errors import UsageError

QDeploy = Callable[..., Result]
CASES = [
    (pattern, kind)
    for kind in FORMATS.values()
    for pattern in PATTERNS
    if pattern in (kind.patterns or PATTERNS)
]


@pytest.mark.parametrize(("pattern", "kind"), CASES, ids=[f"{k.name}-{p}" for p, k in CASES])
def test_every_graph_is_sound_and_is_computed_alike_by_onnx_itself(
    tmp_path: Path, pattern: str, kind
) -> None:
    graph = model(pattern, kind)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, tmp_path / "model.onnx")
    assert bool(meant_int8(tmp_path / "model.onnx")) == (kind.activations == "INT8")
    inputs = example(1)
    found = oracle(tmp_path / "model.onnx", inputs)
    if kind.name in (
        "fp32",
        "int8",
        "int7",
    ):  # onnx's own evaluator needs minutes for fp8 and has no blocks of int4
        expected = ReferenceEvaluator(graph).run(None, {name: x.numpy() for name, x in inputs.items()})[0]
        # an activation that lies on the edge between two codes may fall either way
        assert sqnr_db(found, torch.from_numpy(expected)) > (100 if kind.name == "fp32" else 50)


def test_the_graphs_read_the_timestep(tmp_path: Path) -> None:
    for pattern in PATTERNS:
        onnx.save(model(pattern, FORMATS["fp32"]), tmp_path / "model.onnx")
        later = example(1) | {"timestep": torch.tensor(900.0)}
        assert not torch.equal(
            oracle(tmp_path / "model.onnx", example(1)), oracle(tmp_path / "model.onnx", later)
        )


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_backends_of_this_machine_pass(qdeploy: QDeploy, backend: str) -> None:
    result = qdeploy("selftest", "--backend", backend, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"]
    assert {case["format"] for case in report["cases"]} == {"fp32", "int8", "int7"}
    assert len(report["cases"]) == 3 * len(PATTERNS)
    assert report["doctor"]["backends"][backend]["usable"]
    if backend == "openvino":
        assert all(case["int8"] == 1 for case in report["cases"] if case["format"] == "int7")


def test_the_report_can_be_kept_in_a_file(qdeploy: QDeploy, tmp_path: Path) -> None:
    result = qdeploy(
        "selftest", "--backend", "onnxruntime", "--format", "fp32", "-o", tmp_path / "report.json"
    )
    assert result.exit_code == 0
    assert "split_shortcut" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["passed"]
    (tmp_path / "file").write_text("")
    refused = qdeploy(
        "selftest", "--backend", "onnxruntime", "--format", "fp32", "-o", tmp_path / "file" / "x"
    )
    assert refused.exit_code == 2


class Wrong(ONNXRuntimeEngine):
    def _run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return super()._run(dict(inputs)) * 1.1


class Broken(ONNXRuntimeEngine):
    def _run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise ZeroDivisionError("of all things")


@pytest.mark.parametrize(("engine", "status"), [(Wrong, "inaccurate"), (Broken, "crashed")])
def test_a_backend_that_is_wrong_fails_with_a_report(
    qdeploy: QDeploy, monkeypatch: pytest.MonkeyPatch, engine: type[ONNXRuntimeEngine], status: str
) -> None:
    bad: Backend = dataclasses.replace(backends()["onnxruntime"], load=engine)
    monkeypatch.setitem(backends(), "onnxruntime", bad)
    result = qdeploy("selftest", "--backend", "onnxruntime", "--format", "fp32", "--json", "-q")
    assert result.exit_code == 3
    cases = json.loads(result.stdout)["cases"]
    assert {case["status"] for case in cases} == {status}
    assert all(("ZeroDivisionError" in case["reason"]) == (status == "crashed") for case in cases)
    assert f"fp32 conv {status}" in result.stderr


def test_without_a_gpu_tensorrt_is_refused_in_one_sentence(qdeploy: QDeploy) -> None:
    if backends()["tensorrt"].available():
        pytest.skip("this machine has a GPU")
    result = qdeploy("selftest", "--backend", "tensorrt")
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown format 'int3'"):
        selftest("onnxruntime", formats=["int3"])
    with pytest.raises(UsageError, match="unknown engine precision"):
        selftest("onnxruntime", precision="f8")


@pytest.mark.gpu
def test_tensorrt_passes_on_a_gpu() -> None:
    report = selftest("tensorrt", "f16")
    assert report.passed, report.failures
