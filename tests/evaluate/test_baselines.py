"""Engines in full precision that others are compared with: made once for a model and shapes, kept in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.calibration_set.collect import collect
from qdeploy.evaluate.baselines import baseline_bundle, baseline_engine
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.store.artifact import open_artifact
from tests.evaluate.conftest import Way


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_calibrations_of_one_model_share_their_baseline(way: Way, ddpm: Path, tmp_path: Path) -> None:
    model = open_model(ddpm)
    likes = []
    for seed in (1, 2):
        data = collect(
            ddpm, tmp_path / f"set-{seed}", samples=2, keep=2, steps=2, scheduler="ddim", seed=seed
        )
        likes.append(export(ddpm, tmp_path / f"onnx-{seed}", calibration=data))
    first, second = (baseline_bundle(model, like) for like in likes)
    assert likes[0].sha256 != likes[1].sha256
    assert (first.path, first.sha256) == (second.path, second.sha256)

    engine = baseline_engine(model, "openvino", "f32", way.engine)
    assert baseline_engine(model, "openvino", "f32", way.engine).manifest == engine.manifest


@pytest.mark.slow
def test_a_damaged_baseline_is_made_again(
    ddpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(ddpm)
    bundle = baseline_bundle(model)
    weights = max(bundle.path.rglob("*.onnx*"), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-7])
    again = baseline_bundle(model)
    assert "made again" in capsys.readouterr().err
    assert open_artifact(again.path).sha256 == bundle.sha256
