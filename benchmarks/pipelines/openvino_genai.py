"""OpenVINO GenAI, the C++ pipeline: on what optimum-intel exports, and on qdeploy's folder as it is."""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import Any

from benchmarks.pipelines import DECODER, DENOISER, PARTS, TEXT, Case, Contender, Opened
from benchmarks.pipelines.optimum_intel import ENVIRONMENT, FOLDERS, convert_tokenizer, prepare
from benchmarks.pipelines.qdeploy_engines import ENGINE

OURS = "genai-qdeploy"


def _open(case: Case, folder: str) -> Opened:
    import openvino_genai
    from PIL import Image

    options = {"INFERENCE_PRECISION_HINT": case.precision, "INFERENCE_NUM_THREADS": case.threads}
    pipeline = openvino_genai.Text2ImagePipeline(str(case.place(folder)), "CPU", **options)
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def image(prompt: str, seed: int, steps: int) -> Any:
        made = pipeline.generate(
            prompt,
            num_inference_steps=steps,
            guidance_scale=case.guidance,
            width=case.size,
            height=case.size,
            generator=openvino_genai.TorchGenerator(seed),
        )
        told = pipeline.get_performance_metrics()
        parts[TEXT] = sum(told.get_text_encoder_infer_duration().values())
        parts[DENOISER] = steps * told.get_unet_infer_duration().mean
        parts[DECODER] = told.get_vae_decoder_infer_duration()
        return Image.fromarray(made.data[0])

    return Opened(image, parts)


def _with_tokenizer(case: Case) -> None:
    """qdeploy's folder and the tokenizer's graph, which build-engine writes where its converter is installed."""
    place = case.place(OURS)
    if not place.is_dir():
        shutil.copytree(case.place(ENGINE), place, copy_function=os.link)
    convert_tokenizer(place / "tokenizer")


CONTENDERS = [
    *(
        Contender(
            f"OpenVINO GenAI, {form}",
            partial(_open, folder=folder),
            folder,
            partial(prepare, form=form),
            quantized=form != "float",
            environment=ENVIRONMENT,
        )
        for form, folder in FOLDERS.items()
        if form != "int8 weights"
    ),
    Contender(
        "OpenVINO GenAI, qdeploy W8A8",
        partial(_open, folder=OURS),
        OURS,
        _with_tokenizer,
        quantized=True,
        environment=ENVIRONMENT,
        after="qdeploy W8A8",
    ),
]
