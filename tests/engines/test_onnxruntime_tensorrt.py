from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import Result

from qdeploy.engines import onnxruntime_tensorrt as module
from qdeploy.engines.onnxruntime_tensorrt import PROVIDER, ONNXRuntimeTensorRTEngine, build, provider_options
from qdeploy.engines.registry import backends
from qdeploy.engines.spec import EngineSpec
from qdeploy.system.errors import CapabilityError, UsageError
from tests.engines.bundles import CONFIG, denoiser_graph, example_inputs, expected
from tests.engines.tensorrt.bench import ADA


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(denoiser_graph(True), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_shapes_are_laid_down_as_the_provider_wants_them(graph: Path, tmp_path: Path) -> None:
    build(graph, tmp_path / "out", batch=4)
    profile = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert profile == {"min": "sample:1x3x6x6", "opt": "sample:4x3x6x6", "max": "sample:8x3x6x6"}
    options = provider_options(profile, tmp_path)
    assert options["trt_profile_opt_shapes"] == "sample:4x3x6x6"
    assert options["trt_int8_enable"]
    with pytest.raises(UsageError, match="one profile"):
        build(graph, tmp_path / "two", shapes="sample:1x3x6x6|sample:2x3x6x6")
    with pytest.raises(UsageError, match="latents"):
        build(graph, tmp_path / "two", shapes="latents:1x3x6x6")


def test_it_asks_for_tensorrt_first_and_computes_the_graph(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(graph, tmp_path / "engine" / "unet", precision="f16")
    (tmp_path / "engine" / "unet" / "config.json").write_text(json.dumps(CONFIG))
    asked: list[Any] = []

    import onnxruntime

    real = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[Any], **more: Any) -> Any:
        asked.extend(providers)
        return real(path, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(module, "require", lambda: None)
    monkeypatch.setattr(module, "find_gpu", lambda: ADA)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine = ONNXRuntimeTensorRTEngine(EngineSpec(tmp_path / "engine", "unet", "f16", activations="int8"), 1)
    name, options = asked[0]
    assert name == PROVIDER
    assert asked[1:] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert "-sm89" in options["trt_engine_cache_path"]
    inputs = example_inputs(2)
    torch.testing.assert_close(engine(inputs), expected(denoiser_graph(True), inputs), rtol=0.02, atol=0.05)


def test_it_is_refused_without_a_gpu(qdeploy: Callable[..., Result]) -> None:
    if backends()["onnxruntime-tensorrt"].available():
        pytest.skip("this machine has a GPU")
    result = qdeploy("doctor", "--require", "onnxruntime-tensorrt")
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1


def test_an_onnxruntime_without_the_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "require_gpu", lambda: ADA)
    with pytest.raises(CapabilityError, match="no TensorRT provider: pip uninstall onnxruntime"):
        module.require()


@pytest.mark.gpu
def test_it_computes_the_graph_on_a_gpu(graph: Path, tmp_path: Path) -> None:
    if not backends()["onnxruntime-tensorrt"].available():
        pytest.skip("needs onnxruntime-gpu")
    build(graph, tmp_path / "engine" / "unet")
    (tmp_path / "engine" / "unet" / "config.json").write_text(json.dumps(CONFIG))
    engine = ONNXRuntimeTensorRTEngine(EngineSpec(tmp_path / "engine", "unet", "f32", activations="int8"), 1)
    inputs = example_inputs(2)
    torch.testing.assert_close(engine(inputs), expected(denoiser_graph(True), inputs), rtol=0.02, atol=0.05)
