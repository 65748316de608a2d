"""Bad input at the command line: one sentence, the right exit code, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdeploy.store.artifact import open_artifact
from qdeploy.store.manifest import MANIFEST, read_manifest
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_of
from qdeploy.workflows import preflight
from tests.models import stable_diffusion_folder

Run = Callable[..., Result]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ("--samples", 4, "--steps", 2, "--inference-steps", 4, "--scheduler", "ddim")


@pytest.fixture(scope="session")
def artifacts(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each kind, made by the command line from the tiny pipeline."""
    from qdeploy.calibration_set.collect import collect
    from qdeploy.engines.build import build_engine
    from qdeploy.export.run import export
    from qdeploy.workflows.calibrate import calibrate

    folder = tmp_path_factory.mktemp("artifacts")
    collect(ddpm, folder / "set", samples=4, keep=2, steps=4, scheduler="ddim")
    calibrate(ddpm, folder / "checkpoint", method="minmax", calibration=folder / "set")
    calibrate(
        ddpm,
        folder / "simulated",
        method="minmax",
        coverage="qdiffusion-paper",
        weights="uint4",
        activations="uint8",
        calibration=folder / "set",
    )
    export(folder / "checkpoint", folder / "onnx")
    build_engine(folder / "onnx", folder / "engine")
    return folder


def refused(result: Result, code: int, *words: str) -> None:
    """The command ended with that exit code and one line on stderr that holds the words."""
    message = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == code, result.stderr
    assert message.startswith(("qdeploy: ", "Error: "))
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message, message


def edited(folder: Path, target: Path) -> Path:
    """A copy of a model's folder, to be spoilt."""
    shutil.copytree(folder, target)
    return target / "unet"


# -- models ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_refused(qdeploy: Run, tmp_path: Path) -> None:
    refused(qdeploy("collect", tmp_path, "-o", tmp_path / "set"), 5, "not a diffusers folder")
    assert not (tmp_path / "set").exists()


def test_a_model_that_does_not_exist_is_refused(qdeploy: Run, tmp_path: Path) -> None:
    refused(qdeploy("collect", tmp_path / "nothing", "-o", tmp_path / "set"), 5, "does not exist")


def test_truncated_weights_are_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    weights = edited(ddpm, tmp_path / "model") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(qdeploy("collect", tmp_path / "model", "-o", tmp_path / "set"), 5, "truncated", WEIGHTS)
    assert not (tmp_path / "set").exists()


def test_weights_of_another_class_are_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    weights = edited(ddpm, tmp_path / "model") / WEIGHTS
    save_file({"decoder.weight": torch.zeros(3)}, weights)
    refused(qdeploy("collect", tmp_path / "model", "-o", tmp_path / "set"), 5, "do not belong")


def test_a_class_that_is_no_denoiser_is_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    config = edited(ddpm, tmp_path / "model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderKL"}))
    refused(qdeploy("collect", tmp_path / "model", "-o", tmp_path / "set"), 5, "AutoencoderKL", "no denoiser")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    qdeploy: Run, ddpm: Path, tmp_path: Path, value: float
) -> None:
    weights = edited(ddpm, tmp_path / "model") / WEIGHTS
    state = load_file(weights)
    state["conv_out.weight"].view(-1)[7] = value
    save_file(state, weights)
    refused(
        qdeploy("collect", tmp_path / "model", "-o", tmp_path / "set"), 5, "NaN or Inf", "conv_out.weight"
    )


# -- calibration sets --------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark if it is ever unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_malicious_pickle_is_refused_and_never_executed(
    qdeploy: Run, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"xs": Bomb()}, "zip.pt")
    for file in ("set.pt", "zip.pt"):
        refused(qdeploy("calibrate", ddpm, "-o", "out", "--calibration", file), 5)
        refused(qdeploy("collect", ddpm, "-o", "out", "--from-qdiffusion", file), 5)
    assert not Path("exploded").exists()
    assert not Path("out").exists()


def test_an_empty_folder_is_no_calibration_set(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    result = qdeploy("calibrate", ddpm, "-o", tmp_path / "out", "--calibration", tmp_path / "set")
    refused(result, 5, "not a qdeploy artifact")


def test_another_kind_of_artifact_is_no_calibration_set(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path
) -> None:
    result = qdeploy("calibrate", ddpm, "-o", tmp_path / "out", "--calibration", artifacts / "onnx")
    refused(result, 5, "calibration-set")


def test_a_set_of_another_model_is_refused(qdeploy: Run, artifacts: Path, tmp_path: Path) -> None:
    other = stable_diffusion_folder(tmp_path / "other")
    result = qdeploy("calibrate", other, "-o", tmp_path / "out", "--calibration", artifacts / "set")
    refused(result, 5, "another model")
    assert not (tmp_path / "out").exists()


# -- artifacts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["set", "checkpoint", "onnx", "engine"])
def test_one_flipped_byte_anywhere_is_found(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path, kind: str
) -> None:
    names = [*read_manifest(artifacts / kind).files, MANIFEST]
    for name in names:
        copy = tmp_path / f"{kind}-{names.index(name)}"
        shutil.copytree(artifacts / kind, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        refused(qdeploy("inspect", copy), 5)
    consumer = {
        "set": ("calibrate", ddpm, "--calibration"),
        "checkpoint": ("export",),
        "onnx": ("build-engine",),
        "engine": ("sample", "-n", 1),
    }[kind]
    refused(qdeploy(*consumer, copy, "-o", tmp_path / "out"), 5)
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_a_newer_schema_is_refused(qdeploy: Run, artifacts: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifacts / "checkpoint", copy)
    manifest = json.loads((copy / MANIFEST).read_text()) | {"schema": 99}
    manifest.pop("integrity")
    (copy / MANIFEST).write_text(json.dumps(manifest | {"integrity": sha256_of(manifest)}))
    refused(qdeploy("export", copy, "-o", tmp_path / "out"), 5, "newer", "99")


def test_a_simulation_is_refused_with_its_reason(qdeploy: Run, artifacts: Path, tmp_path: Path) -> None:
    refused(qdeploy("export", artifacts / "simulated", "-o", tmp_path / "out"), 4, "simulation", "softmax")
    refused(qdeploy("build-engine", artifacts / "simulated", "-o", tmp_path / "out"), 4, "softmax")
    assert not (tmp_path / "out").exists()


# -- outputs -----------------------------------------------------------------------------------------------


def test_an_existing_output_is_left_alone(qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    refused(qdeploy("collect", ddpm, "-o", tmp_path / "mine", *SMALL), 2, "already exists")
    refused(qdeploy("collect", ddpm, "-o", artifacts / "onnx", *SMALL), 2, "another artifact", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    open_artifact(artifacts / "onnx")


def test_an_output_that_cannot_be_written_is_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(qdeploy("collect", ddpm, "-o", tmp_path / "file" / "set", *SMALL), 2, "cannot be written")


def test_a_full_disk_is_explained_and_leaves_nothing(ddpm: Path, tmp_path: Path) -> None:
    """The limit on the size of a file stands in for the disk's: the system refuses the same write."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-m", "qdeploy.cli", "collect", ddpm, "-o", tmp_path / "set", *map(str, SMALL)]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert result.returncode == 4, result.stderr
    assert "no space left" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "set").exists()


# -- words and numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--method", "magic"),
        ("--weights", "int2"),
        ("--activations", "fp7"),
        ("--coverage", "some"),
        ("--target", "abacus"),
        ("--effort", "heroic"),
        ("--recipe", "nothing"),
    ],
)
def test_an_unknown_word_is_refused_with_the_known_ones(
    qdeploy: Run, ddpm: Path, tmp_path: Path, option: str, value: str
) -> None:
    refused(qdeploy("calibrate", ddpm, "-o", tmp_path / "out", option, value), 2, value, "choose")
    assert not (tmp_path / "out").exists()


def test_unknown_backends_targets_and_schedulers_are_refused(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(qdeploy("build-engine", artifacts / "onnx", "-o", out, "--backend", "abacus"), 2, "abacus")
    refused(qdeploy("build-engine", artifacts / "onnx", "-o", out, "--backend", "tensorrt"), 4)
    refused(qdeploy("export", artifacts / "checkpoint", "-o", out, "--target", "abacus"), 2, "abacus")
    refused(qdeploy("collect", ddpm, "-o", out, "--scheduler", "abacus"), 2, "abacus")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--activations", "uint8"), ("portable", "uint8")),
        (("--weights", "uint6"), ("portable", "uint6")),
        (("--coverage", "qdiffusion-paper", "--target", "portable"), ("portable", "attention")),
        (("--weights", "none", "--activations", "none"), ("nothing",)),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    qdeploy: Run, ddpm: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(qdeploy("calibrate", ddpm, "-o", tmp_path / "out", *options), 2, *words)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["activation-ranges", "weight-ranges"], ("'activation-ranges' needs weight scales",)),
        (["weight-ranges", "group-channels"], ("'group-channels' changes what weight scales", "before")),
        (["weight-ranges", "align-attention"], ("'align-attention' needs",)),
        (["weight-ranges", "group-patches"], ("'group-patches' needs activation scales",)),
        (["weight-ranges", "activation-ranges", "measure-errors", "learn-scales"], ("'measure-errors'",)),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_stages_in_an_impossible_order_are_refused(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path, stages: list[str], words: tuple[str, ...]
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(json.dumps({"method": "minmax", "stages": stages}))
    command = ("calibrate", ddpm, "-o", tmp_path / "out", "--recipe", recipe, "--calibration")
    refused(qdeploy(*command, artifacts / "set"), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "groups", "words"),
    [
        ("group-channels", 4096, ("4096 groups are more than the", "input channels of", "fewer groups")),
        ("group-channels", 0, ("positive number, not 0",)),
        ("group-channels", 2.5, ("whole number, not 2.5",)),
        ("group-tokens", -1, ("positive number, not -1",)),
        ("group-patches", "many", ("whole number, not 'many'",)),
    ],
)
def test_a_group_count_that_cannot_be_is_refused(
    qdeploy: Run,
    ddpm: Path,
    artifacts: Path,
    tmp_path: Path,
    stage: str,
    groups: object,
    words: tuple[str, ...],
) -> None:
    """Groups are index sets of any size, so a count need not divide; it can only be too large, or none."""
    ranges = ["weight-ranges", "activation-ranges"]
    grouping = {stage: {"groups": groups}}
    stages = [grouping, *ranges] if stage == "group-channels" else [*ranges, grouping]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(json.dumps({"method": "dgq", "target": "simulated", "stages": stages}))
    command = ("calibrate", ddpm, "-o", tmp_path / "out", "--recipe", recipe, "--calibration")
    refused(qdeploy(*command, artifacts / "set"), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["quest", "qdiffusion"])
def test_tuning_without_calibration_data_is_refused(
    qdeploy: Run, ddpm: Path, tmp_path: Path, method: str
) -> None:
    """A default set cannot be made for what takes prompts, nor for a denoiser without its pipeline."""
    out = tmp_path / "out"
    options = ("-o", out, "--method", method, "--weights", "int4")
    prompted = stable_diffusion_folder(tmp_path / "sd")
    refused(qdeploy("calibrate", prompted, *options), 2, "takes prompts", "qdeploy collect --prompts")
    refused(qdeploy("calibrate", ddpm / "unet", *options), 5, "denoiser alone", "collecting needs")
    refused(qdeploy("calibrate", ddpm, *options, "--calibration", tmp_path / "nothing"), 5)
    assert not out.exists()


def test_zero_samples_are_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(qdeploy("collect", ddpm, "-o", out, "--samples", 0), 2)
    refused(qdeploy("collect", ddpm, "-o", out, "--steps", 0), 2)
    refused(qdeploy("sample", ddpm, "-o", out, "-n", 0), 2)
    assert not out.exists()


def test_more_steps_than_the_trajectory_has_are_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    refused(qdeploy("collect", ddpm, "-o", tmp_path / "out", "--steps", 20, "--inference-steps", 10), 2, "20")


def test_images_of_a_size_the_model_cannot_take_are_refused(qdeploy: Run, tmp_path: Path) -> None:
    model = stable_diffusion_folder(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--steps", 2, "--height", 13, "--width", 13)
    refused(qdeploy("sample", model, "-o", tmp_path / "out", "-n", 1, *options), 5)
    assert not (tmp_path / "out").exists()


def test_prompts_must_be_text_and_some(qdeploy: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, word in (("empty", "no prompt"), ("binary", "UTF-8"), ("missing", "cannot be read")):
        refused(qdeploy("collect", "digits", "-o", tmp_path / "out", "--prompts", tmp_path / name), 5, word)


def test_a_device_that_is_not_there_is_refused(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    refused(qdeploy("calibrate", ddpm, "-o", tmp_path / "out", "--device", "cuda"), 4, "cuda")


# -- timesteps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["checkpoint", "engine"])
@pytest.mark.parametrize("timestep", [-1.0, 999.5, 1000.0])
def test_a_timestep_outside_of_training_is_refused(artifacts: Path, kind: str, timestep: float) -> None:
    """Nothing was calibrated there: the nearest scales would be a guess, and no one would know."""
    inputs = {"sample": torch.zeros(2, 3, 8, 8), "timestep": torch.tensor([500.0, timestep])}
    predict = predictor(artifacts / kind)
    with pytest.raises(InvalidInputError, match=f"timesteps from 0 to 999, not {timestep:g}"):
        predict(inputs)
    for allowed in (0.0, 500.25, 999.0):
        assert predict({**inputs, "timestep": torch.tensor([allowed])}).isfinite().all()


def predictor(path: Path) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A checkpoint or an engine as a function of its inputs."""
    from qdeploy.engines.build import load_engine
    from qdeploy.model.inputs import denoise
    from qdeploy.quant.checkpoint import load_checkpoint

    if path.name == "engine":
        return load_engine(path)
    denoiser = load_checkpoint(path)
    return lambda inputs: denoise(denoiser, inputs)


@pytest.mark.parametrize("kind", ["checkpoint", "engine"])
def test_rows_of_one_call_may_have_different_timesteps(artifacts: Path, kind: str) -> None:
    sample = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([7.0, 900.0, 7.0, 0.5, 999.0])
    predict = predictor(artifacts / kind)
    together = predict({"sample": sample, "timestep": timesteps})
    rows = [predict({"sample": sample[i : i + 1], "timestep": timesteps[i : i + 1]}) for i in range(5)]
    alone = torch.cat(rows)
    # a value on the edge between two codes may fall either way in another batch, so not every row agrees
    errors = (together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)
    assert errors.median() < 1e-4
    assert errors.max() < 0.1


@pytest.mark.parametrize("groups", ["0", "-2", "1.5", "a,b", "", "500,200", "200,200", "nan,5", "inf"])
def test_timestep_groups_that_make_no_sense_are_refused(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path, groups: str
) -> None:
    options = ("--calibration", artifacts / "set", "--timestep-groups", groups)
    result = qdeploy("calibrate", ddpm, "-o", tmp_path / "out", "--method", "minmax", *options)
    refused(result, 2, "timestep groups are a number of groups or ascending boundaries")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--timestep-groups", 3), ("3 groups", "2 calibrated timesteps", "at most 2")),
        (("--timestep-groups", "100,200"), ("no calibrated timestep between", "100 and 200")),
        (("--timestep-groups", "5000,"), ("ascending boundaries",)),
        (("--timestep-groups", 2, "--activations", "none"), ("activations are 'none'",)),
    ],
)
def test_timestep_groups_that_cannot_be_are_refused_with_the_reason(
    qdeploy: Run,
    ddpm: Path,
    artifacts: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    words: tuple[str, ...],
) -> None:
    command = ("calibrate", ddpm, "-o", tmp_path / "out", "--method", "minmax", "--calibration")
    refused(qdeploy(*command, artifacts / "set", *options), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--time-table", "fp8"), ("fp8", "fp32")),
        (("--time-table", "fp32", "--table-rows", "nonsense"), ("'nonsense'", "ddim:50")),
        (("--time-table", "fp32", "--table-rows", "ddim:2000"), ("ddim:2000",)),
        (("--time-table", "fp32", "--table-rows", "abacus:50"), ("abacus", "choose from")),
        (
            ("--time-table", "none", "--table-rows", "ddim:50"),
            ("needs a time table", "--time-table auto, fp32"),
        ),
        (("--table-rows", "ddim:50"), ("needs a time table", "--time-table auto, fp32")),
    ],
)
@pytest.mark.parametrize("source", ["checkpoint", "model"])
def test_time_tables_that_make_no_sense_are_refused(
    qdeploy: Run,
    ddpm: Path,
    artifacts: Path,
    tmp_path: Path,
    source: str,
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    given = ddpm if source == "model" else artifacts / "checkpoint"
    refused(qdeploy("export", given, "-o", tmp_path / "out", *options), 2, *words)
    assert not (tmp_path / "out").exists()


# -- what every verb does ----------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from qdeploy.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'diffusers', 'onnx', 'openvino', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def test_json_is_the_only_thing_on_stdout(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    result = qdeploy("collect", ddpm, "-o", tmp_path / "set", *SMALL, "--json")
    summary = json.loads(result.stdout)
    assert summary.keys() >= {"path", "kind", "sha256", "seconds"}
    assert summary["sha256"] == open_artifact(tmp_path / "set").sha256


def test_the_same_request_again_returns_the_finished_artifact(
    qdeploy: Run, ddpm: Path, tmp_path: Path
) -> None:
    first = json.loads(qdeploy("collect", ddpm, "-o", tmp_path / "set", *SMALL, "--json").stdout)
    again = json.loads(qdeploy("collect", ddpm, "-o", tmp_path / "set", *SMALL, "--json").stdout)
    assert first["sha256"] == again["sha256"]
    refused(qdeploy("collect", ddpm, "-o", tmp_path / "set", *SMALL, "--seed", 1), 2, "another artifact")


def test_dry_run_estimates_and_writes_nothing(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path
) -> None:
    result = qdeploy(
        "calibrate", ddpm, "-o", tmp_path / "out", "--calibration", artifacts / "set", "--dry-run", "--json"
    )
    assert json.loads(result.stdout)["estimate"]["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_inspect_describes_every_kind(qdeploy: Run, ddpm: Path, artifacts: Path) -> None:
    kinds = {"set": "calibration-set", "checkpoint": "checkpoint", "onnx": "onnx", "engine": "engine"}
    for name, kind in kinds.items():
        described = json.loads(qdeploy("inspect", artifacts / name, "--json").stdout)
        assert described["kind"] == kind
        assert described["valid"]
        assert described.keys() >= {"schema", "sha256", "made_from", "recipe", "seed"}
    assert json.loads(qdeploy("inspect", ddpm, "--json").stdout)["kind"] == "model"


def test_methods_lists_what_recipes_know(qdeploy: Run) -> None:
    words = json.loads(qdeploy("methods", "--json").stdout)
    assert {"minmax", "qdiffusion"} <= words["methods"].keys()
    assert words["stages"].keys() >= {"weight-ranges", "round-weights", "learn-scales"}


def test_a_dry_run_finds_what_would_fail_after_the_calibration(
    qdeploy: Run, ddpm: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InvalidInputError("this network branches on its input")

    tried = qdeploy("collect", ddpm, "-o", tmp_path / "set", "--steps", "4", "--keep", "2", "--dry-run")
    assert tried.exit_code == 0, tried.stderr
    assert re.search(r"trace into ONNX +works", tried.stderr)
    monkeypatch.setattr(preflight, "trace", refuse)
    for words in (
        ("collect", ddpm, "-o", tmp_path / "set", "--steps", "4", "--keep", "2"),
        ("calibrate", ddpm, "-o", tmp_path / "out", "--calibration", artifacts / "set"),
    ):
        done = qdeploy(*words, "--dry-run")
        assert done.exit_code == 5
        assert done.stderr.splitlines()[-1] == "qdeploy: this network branches on its input"
    assert list(tmp_path.iterdir()) == []
