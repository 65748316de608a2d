"""Tokenizer files for programs with an older transformers, in addition to the one that newer versions write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qdeploy.store.builder import Draft
from qdeploy.store.files import write_text

_FAST, _VOCABULARY, _MERGES = "tokenizer.json", "vocab.json", "merges.txt"


def write_older_files(draft: Draft[Any], folder: str) -> None:
    """Write ``vocab.json`` and ``merges.txt`` of a byte-pair tokenizer that has ``tokenizer.json`` alone.

    Transformers 5 writes nothing else; transformers 4, which optimum pins, opens a CLIP tokenizer from nothing but
    these two. They say the same. Tokenizers of other kinds are left as they are.

    Args:
        draft: holds the tokenizer.
        folder: of the tokenizer in the draft.
    """
    place: Path = draft.content / folder
    if not (place / _FAST).is_file() or (place / _VOCABULARY).exists():
        return
    model = json.loads((place / _FAST).read_text()).get("model") or {}
    if model.get("type") != "BPE":
        return
    write_text(place / _VOCABULARY, json.dumps(model["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_text(place / _MERGES, "\n".join(["#version: 0.2", *merges, ""]))
