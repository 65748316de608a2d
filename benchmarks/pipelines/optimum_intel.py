"""optimum-intel's pipelines on OpenVINO: float, int8 weights, and NNCF's hybrid of int8 layers and int8 weights."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pipelines import Case, Contender, Opened, diffusers_like

ENVIRONMENT = "optimum-intel"
FOLDERS = {"float": "optimum-float", "int8 weights": "optimum-int8", "hybrid int8": "optimum-hybrid"}


def prepare(case: Case, form: str) -> None:
    """Export, quantize, and convert the tokenizer."""
    from optimum.intel import OVDiffusionPipeline, OVWeightQuantizationConfig

    place = case.place(FOLDERS[form])
    if (place / "tokenizer" / "openvino_tokenizer.xml").is_file():
        return
    how: dict[str, Any] = {"load_in_8bit": False}
    if form == "int8 weights":
        how = {"quantization_config": OVWeightQuantizationConfig(bits=8)}
    elif form == "hybrid int8":  # one prompt is sampled in 50 steps, whatever is kept of them
        calls = 100 if case.shape == "scenes" else 16
        how = {
            "quantization_config": OVWeightQuantizationConfig(
                bits=8, quant_method="hybrid", dataset=list(case.prompts), num_samples=calls
            )
        }
    pipeline = OVDiffusionPipeline.from_pretrained(
        older_model(case), export=True, compile=False, local_files_only=True, **how
    )
    pipeline.save_pretrained(place)
    convert_tokenizer(place / "tokenizer")


def older_model(case: Case) -> Path:
    """The model with its text encoder's weights and its tokenizer as transformers 4 knows them.

    It would fill a text encoder that transformers 5 has saved with random weights, and only warn.
    """
    from safetensors.torch import load_file, save_file

    place = case.place("older-model")
    if not place.is_dir():
        shutil.copytree(case.model, place.with_suffix(".part"))
        file = place.with_suffix(".part") / "text_encoder" / "model.safetensors"
        prefix, weights = "text_model.", load_file(file)
        named = {name if name.startswith(prefix) else prefix + name: x for name, x in weights.items()}
        save_file(named, file, metadata={"format": "pt"})
        words = place.with_suffix(".part") / "tokenizer"
        if not (words / "vocab.json").is_file():
            told = json.loads((words / "tokenizer.json").read_text())["model"]
            (words / "vocab.json").write_text(json.dumps(told["vocab"]))
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in told["merges"]]
            (words / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
        place.with_suffix(".part").rename(place)
    return place


def convert_tokenizer(place: Path) -> None:
    """The tokenizer of a folder as a graph beside it, unless it is there."""
    import openvino
    import openvino_tokenizers
    from transformers import AutoTokenizer

    file = place / "openvino_tokenizer.xml"
    if not file.is_file():
        tokenizer = AutoTokenizer.from_pretrained(place)
        openvino.save_model(openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=False), file)


def _open(case: Case, folder: str) -> Opened:
    import torch
    from optimum.intel import OVDiffusionPipeline

    torch.set_num_threads(case.threads)
    config = {"INFERENCE_PRECISION_HINT": case.precision, "INFERENCE_NUM_THREADS": str(case.threads)}
    pipeline = OVDiffusionPipeline.from_pretrained(
        case.place(folder), ov_config=config, local_files_only=True
    )
    return diffusers_like(pipeline, case)


CONTENDERS = [
    Contender(
        f"optimum-intel, {form}",
        partial(_open, folder=folder),
        folder,
        partial(prepare, form=form),
        quantized=form != "float",
        environment=ENVIRONMENT,
    )
    for form, folder in FOLDERS.items()
]
