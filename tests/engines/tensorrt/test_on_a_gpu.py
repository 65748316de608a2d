"""What needs hardware: the same properties, with the real library. Skipped without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.registry import backends
from qdeploy.engines.spec import EngineSpec
from qdeploy.engines.tensorrt.engine import TensorRTEngine
from qdeploy.store.artifact import EngineFolder
from qdeploy.store.manifest import read_manifest
from qdeploy.system.decibels import sqnr_db
from qdeploy.system.errors import InvalidInputError, QDeployError
from tests.engines.bundles import MEANT, denoiser_graph, example_inputs, expected, write_bundle

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    if not backends()["tensorrt"].available():
        pytest.skip("needs TensorRT")


@pytest.fixture(scope="module", params=["f32", "f16", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "quantized")
    output = tmp_path_factory.mktemp("engines") / request.param
    return build_engine(bundle, output, backend="tensorrt", precision=request.param, batch=2).path


def test_it_computes_what_the_graph_says(folder: Path) -> None:
    inputs = example_inputs(5)
    with load_engine(folder) as engine:
        precision = engine.precision
        result = engine(inputs)
    assert result.device.type == "cpu"
    assert (
        sqnr_db(result, expected(denoiser_graph(True), inputs))
        > {"f32": 45, "f16": 40, "bf16": 30}[precision]
    )


def test_tensors_on_the_gpu_stay_there_and_are_left_alone(folder: Path) -> None:
    inputs = {name: x.cuda() for name, x in example_inputs(2).items()} | {"timestep": torch.tensor(7.0)}
    with load_engine(folder) as engine:
        first = engine(inputs)
        kept = first.clone()
        engine({**inputs, "sample": -inputs["sample"]})
        torch.cuda.synchronize()
        assert first.is_cuda
        assert torch.equal(first, kept)


def test_graphs_compute_the_same_as_calls(folder: Path) -> None:
    inputs = example_inputs(2) | {"timestep": torch.tensor(7.0)}
    with load_engine(folder) as engine:
        assert isinstance(engine, TensorRTEngine)
        recorded = [engine(inputs) for _ in range(3)]
        assert engine._execution.graphs
        engine._execution.graphs = False
        assert all(torch.equal(result, engine(inputs)) for result in recorded)


def test_the_inspector_finds_the_planned_layers_in_int8(folder: Path) -> None:
    report = json.loads((folder / "unet" / "layers.json").read_text())["report"]
    assert report["detailed"]
    assert report["planned"] == len(MEANT)
    assert report["not_found"] == []


def test_a_truncated_plan_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    plan = copy / "unet" / "model.plan"
    plan.write_bytes(plan.read_bytes()[:1000])
    with pytest.raises(InvalidInputError, match="damaged"):
        load_engine(copy)
    spec = EngineSpec.of(EngineFolder(copy, read_manifest(copy)))
    with pytest.raises(InvalidInputError, match="1000 of"):
        backends()["tensorrt"].load(spec, None)


@pytest.mark.parametrize(
    "build_options",
    [
        {"optimization_level": 1, "workspace": 1.0},
        {"refit": True},
        {"strip_plan": True},
        {"weight_streaming": True},
        {"hardware_compatible": True},
    ],
    ids=lambda build_options: "-".join(build_options),
)
def test_each_option_gives_an_engine_that_computes_the_same(
    tmp_path: Path, build_options: dict[str, object]
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    engine = build_engine(
        bundle, tmp_path / "engine", backend="tensorrt", timing_cache=tmp_path / "cache", **build_options
    )
    inputs = example_inputs(2)
    with load_engine(engine) as loaded:
        assert sqnr_db(loaded(inputs), expected(denoiser_graph(True), inputs)) > 40
    assert list((tmp_path / "cache").glob("*.timing"))


def test_what_the_parser_refuses_is_told_with_its_node(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", unknown=True)
    with pytest.raises(QDeployError, match="Mystery"):
        build_engine(bundle, tmp_path / "engine", backend="tensorrt")


def test_kernels_of_tensorrt_for_rtx_are_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not backends()["tensorrt-rtx"].available():
        pytest.skip("needs TensorRT for RTX and a GPU that it supports")
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    bundle = write_bundle(tmp_path / "bundle")
    folder = build_engine(bundle, tmp_path / "engine", backend="tensorrt-rtx", precision="f16", batch=2).path
    inputs = example_inputs(2)
    results = []
    for _ in range(2):
        with load_engine(folder) as engine:
            results.append(engine(inputs))
        (kept,) = (tmp_path / "cache" / "tensorrt-rtx").glob("*.kernels")
        results.append(kept.read_bytes())
    assert torch.equal(results[0], results[2])
    assert results[1] == results[3]
    assert "compiled again" not in capsys.readouterr().err
