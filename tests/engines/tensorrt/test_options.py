from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import Result

from qdeploy.cli import main
from qdeploy.engines.backend_options import BackendOptions
from qdeploy.engines.build import build_engine
from qdeploy.engines.registry import backends
from qdeploy.engines.tensorrt.options import BUILD_OPTIONS, Options, check_machine, check_options
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import QDeployError, UsageError
from tests.engines.tensorrt.bench import ADA, GRAPH


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "f32, f16, bf16"),
        ({"batch": 0}, "at least 1"),
        ({"workspace": 0.0}, "more than 0"),
        ({"optimization_level": 6}, "from 0 to 5"),
        ({"optimization_level": 0, "timing_cache": Path("c")}, "no effect"),
        ({"version_compatible": True, "refit": True}, "reduced runtime"),
        ({"version_compatible": True, "strip_plan": True}, "reduced runtime"),
        ({"strip_plan": True, "weight_streaming": True}, "leave one out"),
        ({"strip_plan": True, "refit": True}, "leave one out"),
    ],
)
def test_impossible_wishes_are_refused_on_any_machine(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        check_options(Options(**options))
    assert error.value.exit_code == 2


def test_wishes_that_go_together_pass() -> None:
    check_options(Options(refit=True, weight_streaming=True, hardware_compatible=True, optimization_level=5))
    check_options(Options(strip_plan=True, timing_cache=Path("c"), workspace=0.5))


@pytest.mark.parametrize(
    ("options", "graph", "sm", "words"),
    [
        ({"hardware_compatible": True}, {}, (7, 5), "8.0"),
        ({"precision": "bf16"}, {}, (7, 5), "bf16 need"),
        ({}, {"low_bit": frozenset({"fp8"})}, (8, 6), "fp8 need compute capability 8.9"),
        ({}, {"low_bit": frozenset({"int4"}), "opset": 20}, (8, 9), "opset 21"),
        ({}, {"weight_bytes": 30 * 2**30}, (8, 9), "--weight-streaming"),
    ],
)
def test_what_the_gpu_lacks_is_refused(
    options: dict[str, Any], graph: dict[str, Any], sm: tuple[int, int], words: str
) -> None:
    gpu = replace(ADA, capability=sm)
    with pytest.raises(QDeployError, match=words):
        check_machine(Options(**options), replace(GRAPH, **graph), gpu)
    newest = replace(ADA, capability=(9, 0), memory=80 * 2**30)
    check_machine(Options(**options), replace(GRAPH, **graph | {"opset": 21}), newest)


def test_large_weights_may_stream() -> None:
    large = replace(GRAPH, weight_bytes=30 * 2**30)
    check_machine(Options(weight_streaming=True), large, ADA)


@pytest.mark.parametrize("name", BUILD_OPTIONS)
def test_other_backends_refuse_each_wish_in_one_sentence(
    qdeploy: Callable[..., Result], quantized_bundle: Artifact, tmp_path: Path, name: str
) -> None:
    values = {"shapes": ["x:1"], "timing_cache": ["c"], "workspace": [2], "optimization_level": [0],
              "time_limit": [1], "memory_limit": [1]}  # fmt: skip
    option = f"--{name.replace('_', '-')}"
    result = qdeploy("build-engine", quantized_bundle.path, "--backend", "openvino", "-o", tmp_path / "out",
                     option, *values.get(name, []))  # fmt: skip
    assert result.exit_code == 2
    assert f"{option} is an option of" in result.stderr
    assert "not of openvino" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_place_of_the_cache_is_no_fact() -> None:
    assert Options(timing_cache=Path("a")).facts() == Options(timing_cache=Path("b")).facts()
    assert Options(refit=True).facts() != Options().facts()


def test_the_typed_keywords_are_those_of_the_backends_and_of_the_command() -> None:
    keywords = get_type_hints(BackendOptions).keys()
    assert keywords == {name for backend in backends().values() for name in backend.build_options}
    written = {parameter.name for parameter in main.commands["build-engine"].params}
    assert keywords <= written
    own = set(signature(build_engine).parameters) - {"bundle", "build_options"}
    assert written - keywords == own | {"onnx", "require_signature", "as_json", "verbose", "quiet", "debug"}
