"""The published JSON Schema is the one that manifests are checked by; artifacts of earlier versions still open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qdeploy.store.artifact import KINDS, Checkpoint, EngineFolder, open_artifact
from qdeploy.store.manifest import MANIFEST
from qdeploy.store.measured import CheckpointMeasured, LatencyMeasured
from qdeploy.store.schema import manifest_schema, schema_text
from qdeploy.system.errors import InvalidInputError
from tests.helpers import reseal, small_artifact, small_draft, some_facts

PUBLISHED = Path(__file__).parents[2] / "docs" / "manifest.schema.json"


def test_the_published_schema_is_current() -> None:
    """If not: ``python -m qdeploy.store.schema > docs/manifest.schema.json``."""
    assert PUBLISHED.read_text() == schema_text()


def test_every_kind_has_its_own_facts_in_it() -> None:
    kinds = [entry["properties"]["kind"]["const"] for entry in manifest_schema()["allOf"][1]["oneOf"]]
    assert kinds == sorted(KINDS)


def test_what_the_classes_require_the_schema_requires(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    schema = manifest_schema()["$defs"]
    assert set(schema["Manifest"]["required"]) == set(json.loads((made.path / MANIFEST).read_text()))
    assert set(schema["CheckpointFacts"]["required"]) <= set(some_facts().to_json())
    assert schema["CheckpointFacts"]["additionalProperties"] is False


# Facts as the first version of schema 1 wrote them; what came later is missing.
FIRST: dict[Any, dict[str, Any]] = {
    Checkpoint: {
        "component": "unet", "class": "UNet2DModel", "model_sha256": "0" * 64, "precision": "W8A8",
        "weights": "int8", "activations": "int8", "target": "portable", "simulated": [], "layers": 39,
    },
    EngineFolder: {
        "component": "unet", "class": "UNet2DModel", "model_sha256": "0" * 64, "precision": "W8A8",
        "weights": "int8", "activations": "int8", "target": "portable", "backend": "openvino",
        "backend_version": "2026.4.1", "engine_precision": "f32", "batch": 1, "threads": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FIRST)
def test_artifacts_of_the_first_version_of_schema_1_still_open(tmp_path: Path, kind: Any) -> None:
    made = small_artifact(tmp_path / "a", kind=kind)
    reseal(made.path, lambda manifest: manifest.update(facts=FIRST[kind], notes={"source": None}))
    found = open_artifact(made.path, kind)
    assert found.facts.to_json() == FIRST[kind]
    assert found.facts.timesteps is None


def engine_with(folder: Path, measured: dict[str, Any]) -> Path:
    made = small_artifact(folder, kind=EngineFolder)
    reseal(made.path, lambda manifest: manifest.update(measured=measured))
    return made.path


def test_measurements_are_typed_and_unknown_names_are_kept(tmp_path: Path) -> None:
    written = {
        "seconds": 2,
        "ms": {"median": 1.5, "p95": 2.5},
        "int8_mac_share": 1,
        "of_another_version": [1],
    }
    engine = open_artifact(engine_with(tmp_path / "a", written), EngineFolder)
    assert engine.measured.ms == LatencyMeasured(median=1.5, p95=2.5)
    assert engine.measured.to_json() == {name: written[name] for name in ("seconds", "ms", "int8_mac_share")}
    assert engine.manifest.measured == written


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"ms": "fast"}, "$.ms"),
        ({"ms": {"median": -1.0, "p95": 1.0}}, "$.ms.median"),
        ({"ms": {"median": 1.0}}, "$.ms"),
        ({"int8_mac_share": 1.5}, "$.int8_mac_share"),
        ({"machine": {"cpu": 5, "features": [], "cores": 1}}, "$.machine.cpu"),
        ({"seconds": None}, "$.seconds"),
    ],
)
def test_measurements_of_a_wrong_type_or_range_are_refused(
    tmp_path: Path, wrong: dict[str, Any], place: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(f"`{place}`")):
        open_artifact(engine_with(tmp_path / "a", wrong))


def test_what_stages_report_is_apart_from_what_is_measured(tmp_path: Path) -> None:
    with small_draft(tmp_path / "a") as draft:
        took = CheckpointMeasured(stage_seconds={"0-round": 1.5})
        draft.finish(some_facts(), took, reports={"of_a_stage": {"layers": 3}})
    checkpoint = open_artifact(tmp_path / "a", Checkpoint)
    assert checkpoint.stage_reports == {"of_a_stage": {"layers": 3}}
    assert checkpoint.measured.stage_seconds == {"0-round": 1.5}
