"""The published JSON Schema is the one that manifests are checked by; artifacts of earlier versions still open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qdeploy.store.artifact import KINDS, Checkpoint, EngineFolder, open_artifact
from qdeploy.store.manifest import MANIFEST
from qdeploy.store.schema import manifest_schema, schema_text
from tests.helpers import reseal, small_artifact, some_facts

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
