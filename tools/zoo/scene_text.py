"""The tokenizer and the text encoder of the zoo's ``scenes``: CLIP's, with a vocabulary for its small world."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from qdeploy.evaluate.scene_world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

TOKENS = 24
WIDTH = 128
_START, _END = "<|startoftext|>", "<|endoftext|>"
_OTHERS = ("a", "two", "three", "on", "background", "right of", "below")


def words() -> list[str]:
    """Every word that a caption can hold; each becomes one token."""
    plurals = [shape + ("es" if shape.endswith("ss") else "s") for shape in SHAPES]
    phrases = [*SHAPES, *plurals, *COLOURS, *SIZES, *BACKGROUNDS, *RELATIONS, *_OTHERS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def write_tokenizer(folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the configuration of a `CLIPTokenizer`.

    Any other word falls into pieces, down to the single byte: no text is unknown.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges()
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), _START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, indent=0) + "\n")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _learn_merges() -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1) until every word is one piece.

    Of equally frequent pairs the first in alphabetical order is merged, so that every run learns the same;
    the trainer of ``tokenizers`` does not promise that.
    """
    texts = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    merges = []
    while any(len(text) > 1 for text in texts):
        pairs = Counter(pair for text in texts for pair in pairwise(text))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        texts = [_merged(text, best) for text in texts]
    return merges


def _merged(text: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in text:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def new_text_encoder(tokenizer: Any) -> Any:
    """An untrained `CLIPTextModel` for a tokenizer: two layers of width 128."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: Any, texts: list[str]) -> Any:
    """Token numbers ``[N, 24]``, as `StableDiffusionPipeline` makes them."""
    return tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
