"""The JSON Schema of manifests, from the classes that check them. ``python -m qdeploy.store.schema`` prints it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from qdeploy.store.artifact import KINDS
from qdeploy.store.manifest import Manifest


def manifest_schema() -> dict[str, Any]:
    """The schema of ``qdeploy.json`` (draft 2020-12): for each kind its facts and measurements."""
    kinds = dict(sorted(KINDS.items()))
    types = [kind.FACTS for kind in kinds.values()], [kind.MEASURED for kind in kinds.values()]
    (manifest, *references), definitions = msgspec.json.schema_components(
        [Manifest, *types[0], *types[1]], ref_template="#/$defs/{name}"
    )
    facts, measured = references[: len(kinds)], references[len(kinds) :]
    alternatives = [
        {"properties": {"kind": {"const": name}, "facts": stated, "measured": found}}
        for name, stated, found in zip(kinds, facts, measured, strict=True)
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
