"""Pipeline folders open in OpenVINO GenAI, optimum-intel and optimum, and make the pictures that they make here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from qdeploy.calibration_set.collect import collect
from qdeploy.export.run import export
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.store.artifact import Artifact, Bundle, Checkpoint
from qdeploy.workflows.calibrate import calibrate
from tests.environments import environment, run
from tests.models.pipelines import stable_diffusion_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPT, STEPS, GUIDANCE, SEED, SIZE = "a cat", 4, 4.0, 3, 64
GENAI = ("openvino-genai", "openvino-tokenizers")
OPTIMUM_INTEL = ("optimum-intel==2.2.0", "transformers<5", "diffusers<0.37", "nncf>=3.3")
OPTIMUM = ("optimum[onnxruntime]==2.0.0", "optimum-onnx==0.0.3", "transformers<5", "diffusers<0.37")

_BUILD = """
import json, sys
from qdeploy.engines.build import build_engine
components = {"vae": "f32", "text_encoder": "f32"}
engine = build_engine(sys.argv[1], sys.argv[2], backend="openvino", threads=1, components=components)
print(json.dumps({"sha256": engine.sha256}))
"""
_GENAI = """
import json, sys
import numpy, openvino_genai
folder, output, prompt, steps, guidance, seed, size = sys.argv[1:]
options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", **options)
image = pipeline.generate(
    prompt, num_inference_steps=int(steps), guidance_scale=float(guidance), width=int(size), height=int(size),
    generator=openvino_genai.TorchGenerator(int(seed)),
)
numpy.save(output, image.data)
print(json.dumps({"version": openvino_genai.__version__}))
"""
_OPTIMUM = """
import json, sys
import numpy, torch
folder, output, prompt, steps, guidance, seed, size, kind = sys.argv[1:]
if kind == "openvino":
    from optimum.intel import OVDiffusionPipeline
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    pipeline = OVDiffusionPipeline.from_pretrained(folder, ov_config=config, local_files_only=True)
else:
    from optimum.onnxruntime import ORTDiffusionPipeline
    pipeline = ORTDiffusionPipeline.from_pretrained(folder, local_files_only=True)
image = pipeline(
    prompt, num_inference_steps=int(steps), guidance_scale=float(guidance), width=int(size), height=int(size),
    generator=torch.Generator().manual_seed(int(seed)), output_type="np",
).images
numpy.save(output, (image * 255).round().astype("uint8"))
print(json.dumps({"pipeline": type(pipeline).__name__}))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A W8A8 model with a real VAE's eightfold enlarging, as ONNX."""
    folder = tmp_path_factory.mktemp("programs")
    stock = stable_diffusion_folder(folder / "pndm", channels=(16, 32), vae_channels=(8, 8, 8, 8))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stock, safety_checker=None)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.save_pretrained(folder / "model")
    prompts = ["a cat", "two dogs"]
    data = collect(folder / "model", folder / "set", steps=4, samples=2, inference_steps=4, prompts=prompts)
    assert isinstance(data, Artifact)
    made = calibrate(folder / "model", folder / "checkpoint", recipe="w8a8-minmax", calibration=data.path)
    assert isinstance(made, Checkpoint)
    return export(made, folder / "onnx")


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment("genai", GENAI, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def engine(bundle: Bundle, genai: Path) -> Path:
    """Built where OpenVINO's converter of tokenizers is installed."""
    path = bundle.path.with_name("engine")
    run(genai, _BUILD, bundle.path, path)
    assert (path / "tokenizer" / "openvino_tokenizer.xml").is_file()
    return path


@pytest.fixture(scope="module")
def expected(engine: Path) -> Any:
    """The picture of qdeploy's own pipeline."""
    generator = torch.Generator().manual_seed(SEED)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return load_pipeline(engine)(PROMPT, generator=generator, output_type="np", **options).images * 255


def psnr(picture: Path, expected: Any) -> float:
    found = np.load(picture).astype(float)
    assert found.shape == expected.shape == (1, SIZE, SIZE, 3)
    return float(10 * np.log10(255**2 / np.square(found - expected.round()).mean().clip(1e-12)))


ASKED = (PROMPT, STEPS, GUIDANCE, SEED, SIZE)


def test_openvino_genai_makes_the_same_picture(
    genai: Path, engine: Path, expected: Any, tmp_path: Path
) -> None:
    run(genai, _GENAI, engine, tmp_path / "picture.npy", *ASKED)
    assert psnr(tmp_path / "picture.npy", expected) > 35


def test_optimum_intel_makes_the_same_picture(
    engine: Path, expected: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    python = environment("optimum-intel", OPTIMUM_INTEL, tmp_path_factory.getbasetemp())
    told = run(python, _OPTIMUM, engine, tmp_path / "picture.npy", *ASKED, "openvino")
    assert told["pipeline"] == "OVStableDiffusionPipeline"
    assert psnr(tmp_path / "picture.npy", expected) > 35


def test_optimum_opens_the_bundle_on_onnx_runtime(
    bundle: Bundle, expected: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    python = environment("optimum", OPTIMUM, tmp_path_factory.getbasetemp())
    told = run(python, _OPTIMUM, bundle.path, tmp_path / "picture.npy", *ASKED, "onnxruntime")
    assert told["pipeline"] == "ORTStableDiffusionPipeline"
    assert psnr(tmp_path / "picture.npy", expected) > 35
