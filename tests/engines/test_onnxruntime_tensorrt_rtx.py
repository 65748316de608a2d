"""NVIDIA's plugin for ONNX Runtime: refused in a sentence, and never replaced by the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result

from qdeploy.engines import onnxruntime_tensorrt as shared
from qdeploy.engines import onnxruntime_tensorrt_rtx as module
from qdeploy.engines.onnxruntime_tensorrt_rtx import ONNXRuntimeTensorRTRTXEngine, build
from qdeploy.engines.registry import backends
from qdeploy.engines.spec import EngineSpec
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from tests.engines.bundles import CONFIG, denoiser_graph, example_inputs, expected
from tests.engines.tensorrt.bench import ADA
from tests.helpers import plain_options

# What the plugin calls of the driver and of NVIDIA's management library when it is loaded.
DRIVER = """
cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCurrent
cuDestroyExternalMemory cuDestroyExternalSemaphore cuExternalMemoryGetMappedBuffer cuGetErrorString
cuImportExternalMemory cuImportExternalSemaphore cuInit cuSignalExternalSemaphoresAsync cuStreamGetCtx
cuWaitExternalSemaphoresAsync nvmlErrorString nvmlInit_v2 nvmlShutdown nvmlSystemGetDriverVersion
"""
NO_DEVICE = 100


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(denoiser_graph(True), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def engine_of(graph: Path, folder: Path, precision: str) -> EngineSpec:
    build(graph, folder / "unet", precision=precision)
    (folder / "unet" / "config.json").write_text(json.dumps(CONFIG))
    return EngineSpec(folder, "unet", precision, activations="int8")


@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-4), ("f16", 2e-2)])
def test_the_graph_that_is_written_computes_what_was_exported(
    precision: str, tolerance: float, graph: Path, tmp_path: Path
) -> None:
    build(graph, tmp_path / "out", precision=precision, batch=4)
    profile = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert profile["opt"] == "sample:4x3x6x6"
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", plain_options(), providers=["CPUExecutionProvider"]
    )
    inputs = example_inputs(1)
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    wanted = expected(denoiser_graph(True), inputs).numpy()
    assert np.abs(output - wanted).max() < tolerance * max(1.0, np.abs(wanted).max())


def test_several_profiles_are_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one profile"):
        build(graph, tmp_path / "two", shapes="sample:1x3x6x6|sample:2x3x6x6")
    assert not (tmp_path / "two").exists()


def test_it_is_refused_without_a_driver_in_one_sentence(qdeploy: Callable[..., Result]) -> None:
    if backends()["onnxruntime-tensorrt-rtx"].available():
        pytest.skip("this machine has a GPU")
    result = qdeploy("doctor", "--require", "onnxruntime-tensorrt-rtx")
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1


def test_an_onnxruntime_without_plugins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "require_gpu", lambda **_: ADA)
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(CapabilityError, match="takes no plugins: pip install"):
        module.require()


def test_a_plugin_that_takes_a_part_alone_is_refused_and_nothing_runs_on_the_processor(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options with which the session is opened make ONNX Runtime refuse what no device but the CPU takes.

    The processor stands for the part that the plugin left: with its device alone, real ONNX Runtime must refuse.
    """
    cpu = [device for device in onnxruntime.get_ep_devices() if device.ep_name == "CPUExecutionProvider"]
    monkeypatch.setattr(module, "require", lambda: None)
    monkeypatch.setattr(module, "devices", lambda: cpu)
    monkeypatch.setattr(module, "provider_options", lambda profile, cache: {})
    monkeypatch.setattr(shared, "cache_folder", lambda: tmp_path / "cache")
    spec = engine_of(graph, tmp_path / "engine", "f32")
    with pytest.raises(InvalidInputError, match=r"cannot run all of .*CPU"):
        ONNXRuntimeTensorRTRTXEngine(spec, 1)


plugin = pytest.mark.skipif(
    not backends()["onnxruntime-tensorrt-rtx"].installed(), reason="needs the plugin's package"
)


@plugin
def test_the_real_plugin_without_a_driver_is_a_sentence() -> None:
    if backends()["onnxruntime-tensorrt-rtx"].available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CapabilityError, match=r"cannot load NVIDIA's plugin: .*libcuda") as caught:
        module.devices()
    assert "\n" not in str(caught.value)


@plugin
@pytest.mark.skipif(sys.platform != "linux", reason="compiles shared libraries")
def test_the_real_plugin_with_a_driver_that_has_no_gpu_offers_no_device(tmp_path: Path) -> None:
    """It registers, over libraries in the driver's place that know no GPU, and no device of its own is listed."""
    source = tmp_path / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in DRIVER.split()))
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        command = ["cc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / name), f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)
    program = (
        "from qdeploy.engines import onnxruntime_tensorrt_rtx as module\n"
        "from qdeploy.system.errors import CapabilityError\n"
        "try:\n    module.devices()\nexcept CapabilityError as error:\n    print(error)\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = os.environ | {"LD_LIBRARY_PATH": paths, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip().startswith("NVIDIA's plugin for ONNX Runtime finds no GPU"), (
        run.stdout + run.stderr
    )


@pytest.mark.gpu
@plugin
def test_it_computes_the_graph_on_a_gpu(graph: Path, tmp_path: Path) -> None:
    if not backends()["onnxruntime-tensorrt-rtx"].available():
        pytest.skip("needs an RTX GPU")
    engine: Any = ONNXRuntimeTensorRTRTXEngine(engine_of(graph, tmp_path / "engine", "f16"), 1)
    inputs = example_inputs(2)
    torch.testing.assert_close(engine(inputs), expected(denoiser_graph(True), inputs), rtol=0.02, atol=0.05)
