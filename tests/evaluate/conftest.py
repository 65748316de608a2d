from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.evaluate.baselines import baseline_bundle
from qdeploy.evaluate.quality import QualityPlan
from qdeploy.evaluate.report_page.run import ReportResult, report
from qdeploy.export.run import export
from qdeploy.mixed.ranking import LayerHarm
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import CHECKING
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json
from qdeploy.workflows.calibrate import calibrate

SMALL = QualityPlan(replace(CHECKING, steps=5, batch=2), samples=4, keep=3)


@dataclass(frozen=True)
class Way:
    """Every artifact on the way from a tiny model to its engine."""

    model: Path
    checkpoint: Artifact
    onnx: Artifact
    engine: Artifact


@pytest.fixture(scope="session")
def way(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Way:
    folder = tmp_path_factory.mktemp("way")
    data = collect(ddpm, folder / "set", samples=8, keep=4, steps=5, scheduler="ddim")
    checkpoint = calibrate(ddpm, folder / "w8a8", recipe="w8a8-minmax", effort="fast", calibration=data)
    assert isinstance(checkpoint, Artifact)
    bundle = export(checkpoint, folder / "w8a8-onnx")
    engine = build_engine(bundle, folder / "w8a8-engine", backend="openvino", threads=1)
    return Way(ddpm, checkpoint, bundle, engine)


@pytest.fixture
def full_bundle(way: Way) -> Artifact:
    """The model in full precision, where the benchmark looks for it."""
    return baseline_bundle(open_model(way.model))


@pytest.fixture
def small() -> QualityPlan:
    return SMALL


@pytest.fixture(scope="session")
def page(way: Way, tmp_path_factory: pytest.TempPathFactory) -> ReportResult:
    """A report on the whole way, everything in it measured."""
    folder = tmp_path_factory.mktemp("report")
    harms = {"conv_a": {"weights": {"int4": 1e-2, "int8": 1e-4}, "activations": {"int8": 1e-3}}}
    harms["conv_b"] = {"weights": {"int8": 1e-5}, "activations": {}}
    ranking = [LayerHarm(path, "unit", path, 10, 72, harm) for path, harm in harms.items()]
    written = {"formats": ["int4", "int8"], "layers": [layer.to_json() for layer in ranking]}
    write_json(folder / "sensitivity.json", written)
    return report(
        [way.checkpoint, way.onnx, way.engine],
        folder / "report.html",
        reference=way.model,
        sensitivity=folder,
        shown=3,
        samples=4,
        steps=5,
        speed_batch=(1, 2),
        rounds=3,
    )
