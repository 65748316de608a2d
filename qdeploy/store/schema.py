"""The JSON Schema of manifests, from the classes that check them. ``python -m qdeploy.store.schema`` prints it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from qdeploy.store.artifact import KINDS
from qdeploy.store.facts import Facts
from qdeploy.store.manifest import Manifest


def manifest_schema() -> dict[str, Any]:
    """The schema of ``qdeploy.json`` (draft 2020-12): one alternative per kind, each with its own facts."""
    kinds: dict[str, type[Facts]] = {name: kind.FACTS for name, kind in sorted(KINDS.items())}
    (manifest, *facts), definitions = msgspec.json.schema_components(
        [Manifest, *kinds.values()], ref_template="#/$defs/{name}"
    )
    alternatives = [
        {"properties": {"kind": {"const": name}, "facts": reference}}
        for name, reference in zip(kinds, facts, strict=True)
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of a qdeploy artifact",
        "allOf": [manifest, {"oneOf": alternatives}],
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as it stands in ``docs/manifest.schema.json``."""
    return json.dumps(manifest_schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
