"""optimum-intel's pipelines on OpenVINO: float, int8 weights, and NNCF's hybrid of int8 layers and int8 weights."""

from __future__ import annotations

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
        calls = 160 if case.shape == "scenes" else 16
        how = {
            "quantization_config": OVWeightQuantizationConfig(
                bits=8, quant_method="hybrid", dataset=list(case.prompts), num_samples=calls
            )
        }
    pipeline = OVDiffusionPipeline.from_pretrained(
        case.model, export=True, compile=False, local_files_only=True, **how
    )
    pipeline.save_pretrained(place)
    convert_tokenizer(place / "tokenizer")


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
