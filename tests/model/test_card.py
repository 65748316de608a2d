"""Cards are read as the Hub reads them, and follow from their inputs alone."""

from __future__ import annotations

import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from msgspec.structs import replace

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.engines.measure import latency
from qdeploy.export.run import export
from qdeploy.model.card import CARD, base_model, card, probe_sqnr
from qdeploy.model.folder import Model, open_model
from qdeploy.store.artifact import Artifact, Checkpoint, open_artifact
from qdeploy.workflows.calibrate import calibrate

QUICK = {"samples": 8, "keep": 4, "steps": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def way(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("card")
    data = collect(ddpm, folder / "set", **QUICK)  # type: ignore[arg-type]
    checkpoint = calibrate(ddpm, folder / "w8a8", recipe="w8a8-minmax", effort="fast", calibration=data)
    assert isinstance(checkpoint, Artifact)
    bundle = export(checkpoint, folder / "onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdeploy.engines.measure_build.latency", partial(latency, seconds=0.0))
        return [checkpoint, bundle, build_engine(bundle, folder / "engine", backend="onnxruntime")]


@pytest.mark.slow
@pytest.mark.parametrize("place", range(3), ids=["checkpoint", "onnx", "engine"])
def test_the_hub_reads_it(way: list[Artifact], place: int, ddpm: Path) -> None:
    artifact = way[place]
    assert CARD in artifact.files
    read = ModelCard.load(artifact.file(CARD)).data.to_dict()
    # A name that this project made up is no id of the Hub's.
    assert "base_model" not in read
    assert base_model(open_model(ddpm)) in artifact.file(CARD).read_text()
    assert {"quantized", "w8a8", "minmax"} <= set(read["tags"])
    assert read["pipeline_tag"] == "unconditional-image-generation"
    (result,) = ModelCard.load(artifact.file(CARD)).data.eval_results
    assert (result.metric_type, result.metric_value) == ("sqnr", probe_sqnr(artifact.path))
    assert 10 < result.metric_value < 80


def test_its_code_runs(way: list[Artifact], monkeypatch: pytest.MonkeyPatch, ddpm: Path) -> None:
    for artifact in way:
        (code,) = re.findall(r"```python\n(.*?)```", artifact.file(CARD).read_text(), flags=re.DOTALL)
        code = code.replace(base_model(open_model(ddpm)), str(ddpm)).replace(
            "this-folder", str(artifact.path)
        )
        monkeypatch.setattr(sys.modules["qdeploy.export.run"], "default_output", lambda *_: way[1].path)
        monkeypatch.setattr("qdeploy.engines.build.default_output", lambda *_: way[2].path.parent / "again")
        names: dict[str, object] = {}
        exec(code, names)
        pipe = names["pipe"]
        assert type(pipe.unet).__name__ == "EngineDenoiser"  # type: ignore[attr-defined]


def test_nothing_of_the_place_is_in_it(way: list[Artifact], ddpm: Path, tmp_path: Path) -> None:
    """The same model and set elsewhere give the same bytes, and the same identity."""
    moved, data = tmp_path / "moved", way[0].path.parent / "set"
    shutil.copytree(ddpm, moved)
    again = calibrate(moved, tmp_path / "w8a8", recipe="w8a8-minmax", effort="fast", calibration=data)
    assert isinstance(again, Artifact)
    assert again.file(CARD).read_bytes() == way[0].file(CARD).read_bytes()
    assert again.sha256 == way[0].sha256
    assert str(tmp_path) not in again.file(CARD).read_text()


def test_a_changed_card_is_found(way: list[Artifact], tmp_path: Path) -> None:
    shutil.copytree(way[0].path, tmp_path / "copy")
    (tmp_path / "copy" / CARD).write_text("better than it is")
    with pytest.raises(Exception, match=r"README\.md does not match"):
        open_artifact(tmp_path / "copy")


def test_a_model_from_the_hub_keeps_its_id(way: list[Checkpoint], ddpm: Path, tmp_path: Path) -> None:
    facts, recipe = replace(way[0].facts, base_model="some.one/a-model_1.5"), way[0].recipe
    assert recipe is not None
    (tmp_path / CARD).write_text(card("checkpoint", way[0].path, facts, recipe))
    assert ModelCard.load(tmp_path / CARD).data.to_dict()["base_model"] == "some.one/a-model_1.5"
    snapshot = tmp_path / "models--some.one--a-model_1.5" / "snapshots" / "0123"
    shutil.copytree(ddpm, snapshot)
    assert base_model(Model(snapshot, "unet")) == "some.one/a-model_1.5"
    assert re.fullmatch(r"UNet2DModel-[0-9a-f]{12}", base_model(open_model(ddpm)))
