"""A user's own loop over a pipeline is recorded as `collect` would, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file

import qdeploy as package
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.record import record
from qdeploy.calibration_set.script import Script
from qdeploy.model.folder import open_model
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.models.catalogue.entry import ENTRIES, write_inputs
from tests.models.pipelines import ddpm_folder, stable_diffusion_folder

Run = Callable[..., Result]
PROMPTS = ["a cat", "two dogs", "7 houses"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_folder(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddpm_folder(tmp_path_factory.mktemp("models") / "ddpm")


def same_rows(one: Artifact, other: Artifact) -> bool:
    first, second = (
        {p.name: load_file(p) for p in sorted(made.path.glob("*.safetensors"))} for made in (one, other)
    )
    return first.keys() == second.keys() and all(
        first[file].keys() == second[file].keys()
        and all(torch.equal(first[file][name], second[file][name]) for name in first[file])
        for file in first
    )


def test_a_loop_that_does_what_collect_does_gives_the_same_set(sd: Path, tmp_path: Path) -> None:
    pipeline = open_model(sd).pipeline()
    results = []

    def calls(pipe: Any) -> None:
        for number, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(number)
            made = pipe(
                prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="np"
            )
            results.append(made.images)

    made = record(pipeline, calls, tmp_path / "own", keep=3)
    expected = collect(
        sd, tmp_path / "collected", keep=3, samples=3, steps=4, prompts=PROMPTS, guidance=3.0, batch=1
    )
    assert isinstance(expected, Artifact)
    assert same_rows(made, expected)
    assert made.facts == expected.facts
    assert type(pipeline).__call__ is type(open_model(sd).pipeline()).__call__  # nothing is left behind
    # The loop got the pipeline's own pictures.
    stock = pipeline(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    assert numpy.array_equal(results[0], stock.images)


def test_calls_can_be_a_list_of_their_arguments(sd: Path, tmp_path: Path) -> None:
    listed = [
        {"prompt": PROMPTS[:2], "num_inference_steps": 3},
        {"prompt": PROMPTS[2], "num_inference_steps": 3},
    ]
    made = package.record(sd, listed, tmp_path / "set", keep=2)
    data = CalibrationSet.open(made.path)
    assert data.images.unique().tolist() == [0, 1, 2]
    assert data.facts.inference_steps == 3


def test_enough_images_stop_a_loop_that_never_ends(ddpm: Path, tmp_path: Path) -> None:
    made_so_far = []

    def calls(pipe: Any) -> None:
        while True:
            try:
                pipe(batch_size=2, num_inference_steps=2)
            except Exception:
                made_so_far.append("swallowed")
            made_so_far.append(1)

    made = record(ddpm, calls, tmp_path / "set", keep=2, samples=5)
    assert made.facts.images == 6
    assert made_so_far == [1, 1, 1]


def test_what_a_function_raises_comes_through_and_nothing_stays(ddpm: Path, tmp_path: Path) -> None:
    def calls(pipe: Any) -> None:
        pipe(num_inference_steps=2)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        record(ddpm, calls, tmp_path / "set", keep=2)
    assert not list(tmp_path.iterdir())


def test_loops_that_cannot_be_recorded_are_refused(ddpm: Path, tmp_path: Path) -> None:
    def recorded(calls: Any, **options: Any) -> None:
        record(ddpm, calls, tmp_path / "set", **{"keep": 2, **options})

    with pytest.raises(InvalidInputError, match="never called the DDPMPipeline"):
        recorded(lambda pipe: None)
    with pytest.raises(InvalidInputError, match="record loops of one number of steps"):
        recorded([{"num_inference_steps": 2}, {"num_inference_steps": 3}])
    with pytest.raises(UsageError, match="ask for fewer steps"):
        recorded([{"num_inference_steps": 2}], keep=3)
    with pytest.raises(UsageError, match="samples must be at least 1"):
        recorded([], samples=0)
    assert not list(tmp_path.iterdir())


SCRIPTS = {
    "calls nothing": ("def calls(pipeline):\n    pass\n", "never called"),
    "has no function": ("x = 1\n", "defines no function calls(pipeline)"),
    "raises": (
        "def calls(pipeline):\n    pipeline(num_inference_steps=2)\n    1 / 0\n",
        "line 3, raised ZeroDivisionError",
    ),
    "is no Python": ("def calls(:\n", "line 1, raised SyntaxError"),
    "exits": ("raise SystemExit(3)\n", "ended with exit code 3"),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_bad_scripts_end_in_one_sentence(kind: str, ddpm: Path, tmp_path: Path, qdeploy: Run) -> None:
    code, words = SCRIPTS[kind]
    (tmp_path / "loop.py").write_text(code)
    result = qdeploy("collect", ddpm, "--script", tmp_path / "loop.py", "-o", tmp_path / "set", "--keep", 2)
    assert result.exit_code == 5, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "set").exists()


def test_a_script_that_calls_ten_thousand_times_is_stopped(ddpm: Path, tmp_path: Path, qdeploy: Run) -> None:
    code = "def calls(pipeline):\n    for _ in range(10_000):\n        pipeline(num_inference_steps=2)\n"
    (tmp_path / "loop.py").write_text(code)
    asked = ["collect", ddpm, "--script", tmp_path / "loop.py", "-o", tmp_path / "set", "--keep", 2, "-n", 3]
    result = qdeploy(*asked)
    assert result.exit_code == 0, result.stderr
    assert "3 images are recorded, and the loop is stopped" in result.stderr
    assert qdeploy(*asked).exit_code == 0  # it is there
    assert "--steps does not go with --script" in qdeploy(*asked, "--steps", 7).stderr


def test_an_interrupted_script_is_taken_up(ddpm: Path, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(
        "from pathlib import Path\nimport torch\n"
        "def calls(pipeline):\n"
        "    for number in range(3):\n"
        "        if number == 2 and not Path(__file__).with_name('again').exists():\n"
        "            raise OSError('stopped')\n"
        "        pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(number))\n"
    )
    script = Script(tmp_path / "loop.py")
    with pytest.raises(InvalidInputError, match="stopped"):
        record(ddpm, script, tmp_path / "set", keep=2)
    (tmp_path / "again").touch()
    made = record(ddpm, script, tmp_path / "set", keep=2)
    whole = record(ddpm, script, tmp_path / "whole", keep=2)
    assert same_rows(made, whole)
    assert made.sha256 == whole.sha256


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("Img2Img", marks=pytest.mark.slow),
        pytest.param("Inpaint", marks=pytest.mark.slow),
        "ControlNet",
    ],
)
def test_inputs_of_a_folder_reach_the_pipeline(kind: str, tmp_path: Path) -> None:
    entry = ENTRIES[f"StableDiffusion{kind}Pipeline"]
    options = entry.write(tmp_path / "model")
    made = collect(tmp_path / "model", tmp_path / "set", keep=2, samples=2, steps=4, batch=2, **options)
    assert isinstance(made, Artifact)
    pipeline = open_model(tmp_path / "model").pipeline()
    files = {
        name: [options["inputs"] / name / f"{number}.png" for number in range(2)] for name in entry.inputs
    }
    own = record(
        pipeline,
        [
            {
                **{
                    name: [Image.open(file).convert("L" if "mask" in name else "RGB") for file in listed]
                    for name, listed in files.items()
                },
                "prompt": list(options["prompts"]),
                "guidance_scale": 3.0,
                "num_inference_steps": 4,
                "generator": [torch.Generator().manual_seed(number) for number in range(2)],
            }
        ],
        tmp_path / "own",
        keep=2,
    )
    assert same_rows(own, made)
    assert "inputs" in made.made_from
    # Other pictures make another set.
    write_inputs(options["inputs"], {name: 8 for name in entry.inputs if "mask" not in name}, count=2)
    first = options["inputs"] / "image" / "0.png"
    Image.new("RGB", (8, 8), "red").save(first)
    changed = collect(tmp_path / "model", tmp_path / "other", keep=2, samples=2, steps=4, batch=2, **options)
    assert isinstance(changed, Artifact)
    assert not same_rows(changed, made)
