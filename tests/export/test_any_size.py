"""One graph for several sizes of images and lengths of prompts computes at each what the network computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.export.run import export
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.store.artifact import Artifact, Bundle, Checkpoint, EngineFolder
from qdeploy.store.sizes import check_size, read_sizes, sizes_to_prove, with_size
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import sqnr_db
from tests.models import dit_folder

pytestmark = pytest.mark.slow

SIZES = [(8, 8), (8, 16), (16, 24)]


@pytest.fixture(scope="module")
def checkpoint(stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """W8A8 of the tiny Stable Diffusion model, whose latents have as many pixels as its images."""
    folder = tmp_path_factory.mktemp("sizes")
    prompts = ["a cat", "two dogs"]
    data = collect(stable_diffusion, folder / "set", steps=4, samples=2, inference_steps=4, prompts=prompts)
    assert isinstance(data, Artifact)
    made = calibrate(stable_diffusion, folder / "checkpoint", recipe="w8a8-minmax", calibration=data.path)
    assert isinstance(made, Checkpoint)
    return made


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint) -> Bundle:
    return export(checkpoint, checkpoint.path.with_name("onnx"), sizes="8x16,16x24,8x16")


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> EngineFolder:
    output = bundle.path.with_name(request.param)
    return build_engine(bundle, output, backend=request.param, threads=1, components={"vae": "f32"})


def inputs(height: int, width: int, tokens: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return {
        "sample": torch.randn(2, 4, height, width, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, tokens, 16, generator=generator),
    }


def test_parity_is_proven_at_each_size(engine: EngineFolder) -> None:
    """At least 45 dB, in the middle of the rows: what rounds to the other side is apart by the rounding's noise."""
    measured = engine.measured.sizes
    assert set(measured) == {f"{height}x{width}" for height, width in SIZES}
    for size in measured.values():
        assert size.parity.sqnr_db > 45
        assert size.ms.median > 0


@pytest.mark.parametrize("tokens", [8, 5, 13])
def test_engines_compute_what_was_calibrated_at_each_size_and_length(
    engine: EngineFolder, checkpoint: Checkpoint, tokens: int
) -> None:
    simulated = load_checkpoint(checkpoint)
    with load_engine(engine) as runtime:
        for height, width in SIZES:
            given = inputs(height, width, tokens)
            with torch.no_grad():
                expected = denoise(simulated, given)
            assert sqnr_db(expected, runtime(given)) > 25


def test_pipelines_make_images_of_each_size(engine: EngineFolder) -> None:
    pipeline = load_pipeline(engine)
    for height, width in SIZES:
        made = pipeline("a cat", height=height, width=width, num_inference_steps=2, output_type="np").images
        assert made.shape == (1, height, width, 3)
    with pytest.raises(InvalidInputError, match=r"for images of 8x8, 8x16, 16x24 .*, not 16x16"):
        pipeline("a cat", height=16, width=16, num_inference_steps=2)


def test_a_range_takes_what_lies_in_it_and_is_divisible() -> None:
    fact = read_sizes("256x256..512x768", 8, 8)
    assert sizes_to_prove(fact) == [(32, 32), (64, 96)]
    check_size(fact, (1, 4, 48, 72), "it")
    for height, width in ((24, 64), (64, 104), (36, 64), (64, 100)):
        with pytest.raises(InvalidInputError, match=r"256x256 to 512x768, in steps of 64"):
            check_size(fact, (1, 4, height, width), "it")
    wider = with_size(fact, 16, 128)
    check_size(wider, (1, 4, 16, 128), "it")
    check_size(None, (1, 4, 7, 7), "an engine of one size checks its shape itself")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("512", "HEIGHTxWIDTH"),
        ("512x512,", "HEIGHTxWIDTH"),
        ("512x-1", "HEIGHTxWIDTH"),
        ("500x512", "multiples of 64"),
        ("0x512", "multiples of 64"),
        ("512x512..256x768", "ends before it begins"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read_sizes(text, 8, 8)
    assert error.value.exit_code == 2


def test_what_has_one_size_alone_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiples of 2 here"):
        export(checkpoint, tmp_path / "onnx", sizes="9x9")
    with pytest.raises(CapabilityError, match="holds the positions of one size"):
        export(dit_folder(tmp_path / "dit"), tmp_path / "onnx", sizes="16x16")
    options: dict[str, Any] = {"target": "onnxruntime", "sizes": "8x8"}
    with pytest.raises(UsageError, match="has the size of images in its indices"):
        export(checkpoint, tmp_path / "onnx", **options)
    assert not (tmp_path / "onnx").exists()
