"""Damage: values that nobody expects, changed places of JSON, changed bytes, manifests sealed again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdeploy.store.manifest import MANIFEST
from tests.helpers import reseal

_DEEP: Any = json.loads("[" * 100 + "]" * 100)
# fmt: off
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**20, -(10**20), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "../x", "/etc/passwd", "a\nb", "\x00", "x" * 5000, "\ud83d\ude00", "None", "int8", "unet",
    [], {}, [[]], {"": {}}, [None], {"a": 1}, _DEEP,
)
WORDS = (
    "nan", "inf", "-inf", "1e999", "-1", "0", "1", "9" * 20, "", " ", "x", "../x", "/", "\u0663", "1,2", "a=b", "{",
    "*x",
)
# fmt: on


def changed(value: Any, dice: random.Random) -> Any:
    """A JSON value with one place changed: replaced, removed, doubled or added to."""
    places: list[tuple[Any, Any]] = []

    def walk(item: Any) -> None:
        for key in item if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], dict | list):
                walk(item[key])

    if not isinstance(value, dict | list):
        return dice.choice(HOSTILE)
    walk(value)
    if not places:
        return dice.choice(HOSTILE)
    holder, key = dice.choice(places)
    how = dice.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[dice.choice(("extra", "", "../x", str(key) * 2))] = holder[key]
    else:
        holder[key] = dice.choice(HOSTILE)
    return value


def spoil(file: Path, dice: random.Random) -> None:
    """Change bytes of a file: flipped, cut, doubled, or emptied; of a JSON file mostly its structure."""
    content = bytearray(file.read_bytes())
    if file.suffix == ".json" and dice.random() < 0.7:
        file.write_text(json.dumps(changed(json.loads(content), dice)))
        return
    how = dice.randrange(4)
    # Heads hold what readers believe: lengths, types, offsets.
    end = min(len(content), 600) if dice.random() < 0.7 else len(content)
    if how == 0:
        del content[dice.randrange(max(1, len(content))) :]
    elif how == 1:
        content += content[: dice.randrange(1, 200)]
    else:
        for _ in range(dice.choice((1, 1, 3, 20))):
            if content:
                content[dice.randrange(max(1, end))] = dice.randrange(256)
    file.write_bytes(bytes(content))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and leave its hashes."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def sealed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """As `reseal`, of what can have a hash; what cannot is written as it is."""
    try:
        reseal(folder, change)
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError, OSError):
        change_manifest(folder, change)
