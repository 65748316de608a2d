"""Q-Diffusion's files become calibration sets, row by row; what is not safe or sound is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.importers import import_qdiffusion
from qdeploy.calibration_set.recorder import chosen_calls
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.models import PROMPT_LENGTH, TEXT_WIDTH, ddpm_folder, dit_folder, stable_diffusion_folder

STEPS, SAMPLES = 6, 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "ddpm": ddpm_folder(folder / "ddpm"),
        "sd": stable_diffusion_folder(folder / "sd"),
        "dit": dit_folder(folder / "dit"),
    }


def content(channels: int = 3, prompts: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {
        "xs": torch.randn(STEPS, SAMPLES, channels, 8, 8, generator=generator),
        "ts": torch.arange(STEPS - 1, -1, -1)[:, None].expand(STEPS, SAMPLES) * 100 + 1,
    }
    if prompts:
        cs = torch.randn(1, SAMPLES, PROMPT_LENGTH, TEXT_WIDTH, generator=generator)
        made["cs"] = cs.expand(STEPS, -1, -1, -1)
        made["ucs"] = torch.ones(STEPS, SAMPLES, PROMPT_LENGTH, TEXT_WIDTH)
    return made


def imported(model: Path, file: Path, made: Any, **options: Any) -> CalibrationSet:
    torch.save(made, file)
    options = {"keep": 3, "samples": 18, **options}
    return CalibrationSet.open(import_qdiffusion(model, file, file.with_suffix(""), **options).path)


def listed(value: Tensor) -> list[Tensor]:
    return [step.clone() for step in value]


@pytest.mark.parametrize(
    "form", ["tensor", "list", "tuple", "float t", "one t per step", "with final images"]
)
def test_rows_are_those_of_the_file(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    made, original = content(), content()
    if form in ("list", "tuple"):
        made = {name: (list if form == "list" else tuple)(listed(value)) for name, value in made.items()}
    elif form == "float t":
        original["ts"] = made["ts"] = made["ts"] + 0.25
    elif form == "one t per step":
        made["ts"] = made["ts"][:, 0].clone()
    elif form == "with final images":
        made["xs"] = torch.cat([made["xs"], torch.zeros(1, SAMPLES, 3, 8, 8)])
    data = imported(models["ddpm"], tmp_path / "file.pt", made)
    assert len(data) == 3 * 18
    calls = torch.cat([shard.tensor("call") for shard in data._shards])
    assert sorted(set(calls.tolist())) == chosen_calls(STEPS, 3)
    assert data.timesteps.dtype == original["ts"].dtype
    inputs = data.inputs(range(len(data)))
    assert torch.equal(inputs["sample"], original["xs"][calls, data.images])
    assert torch.equal(inputs["timestep"], original["ts"][calls, data.images])
    assert data.conditional is None


def test_prompts_make_pairs_that_share_sample_and_t(models: dict[str, Path], tmp_path: Path) -> None:
    made = content(4, prompts=True)
    data = imported(models["sd"], tmp_path / "file.pt", made)
    assert data.conditional is not None
    assert data.conditional.tolist() == [True, False] * (3 * 18)
    calls = torch.cat([shard.tensor("call") for shard in data._shards])
    inputs = data.inputs(range(len(data)))
    assert torch.equal(inputs["sample"], made["xs"][calls, data.images])
    expected = torch.where(data.conditional[:, None, None], made["cs"][calls, data.images], made["ucs"][0, 0])
    assert torch.equal(inputs["encoder_hidden_states"], expected)
    stored = [len(shard.tensor("condition.encoder_hidden_states")) for shard in data._shards]
    assert stored == [16 + 1, 2 + 1], "each prompt once, the empty one once per shard"


def test_prompts_alone_make_conditional_rows(models: dict[str, Path], tmp_path: Path) -> None:
    made = content(4, prompts=True)
    del made["ucs"]
    data = imported(models["sd"], tmp_path / "file.pt", made)
    assert data.conditional is not None
    assert data.conditional.all()
    assert len(data) == 3 * 18


def test_prompts_that_change_with_the_step_are_kept(models: dict[str, Path], tmp_path: Path) -> None:
    made = content(4, prompts=True)
    made["cs"] = torch.randn(STEPS, SAMPLES, PROMPT_LENGTH, TEXT_WIDTH)
    data = imported(models["sd"], tmp_path / "file.pt", made)
    calls = torch.cat([shard.tensor("call") for shard in data._shards])
    found = data.inputs(range(0, len(data), 2))["encoder_hidden_states"]
    assert torch.equal(found, made["cs"][calls[::2], data.images[::2]])


def test_half_precision_becomes_what_the_network_takes(models: dict[str, Path], tmp_path: Path) -> None:
    made = content(4, prompts=True)
    data = imported(
        models["sd"],
        tmp_path / "file.pt",
        {name: value.half() if name != "ts" else value for name, value in made.items()},
    )
    model = open_model(models["sd"])
    denoiser = model.load()
    data.check_fits(model, denoiser)
    assert denoise(denoiser, data.inputs([0, 1])).dtype == torch.float32


def test_the_same_file_gives_the_same_bytes_and_is_imported_once(
    models: dict[str, Path], tmp_path: Path
) -> None:
    torch.save(content(), tmp_path / "file.pt")
    options: dict[str, Any] = {"keep": 2, "samples": 3}
    first = import_qdiffusion(models["ddpm"], tmp_path / "file.pt", tmp_path / "one", **options)
    second = import_qdiffusion(models["ddpm"], tmp_path / "file.pt", tmp_path / "two", **options)
    again = import_qdiffusion(models["ddpm"], tmp_path / "file.pt", tmp_path / "one", **options)
    assert first.sha256 == second.sha256
    assert again == first
    with pytest.raises(UsageError, match="--overwrite"):
        import_qdiffusion(models["ddpm"], tmp_path / "file.pt", tmp_path / "one", keep=3, samples=3)


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("form", ["torch.save", "legacy torch.save", "pickle"])
def test_code_in_a_file_is_never_executed(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    victim, file = tmp_path / "executed", tmp_path / "file.pt"
    made = {**content(), "extra": Malicious(victim)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(made))
    else:
        torch.save(made, file, _use_new_zipfile_serialization=form == "torch.save")
    with pytest.raises(InvalidInputError, match=r"more than tensors|plain pickle"):
        import_qdiffusion(models["ddpm"], file, tmp_path / "set")
    assert not victim.exists()
    assert not (tmp_path / "set").exists()


def without(name: str) -> dict[str, Any]:
    made = content()
    del made[name]
    return made


def replaced(name: str, value: Any, channels: int = 3, prompts: bool = False) -> dict[str, Any]:
    made = content(channels, prompts)
    made[name] = value(made[name]) if callable(value) else value
    return made


def set_nan(value: Tensor) -> Tensor:
    value = value.clone().float()
    value[0, 0] = torch.nan
    return value


@pytest.mark.parametrize(
    ("model", "made", "message"),
    [
        ("ddpm", [1, 2], "holds a list instead of a dictionary"),
        ("ddpm", {}, "lacks 'xs': it has nothing"),
        ("ddpm", without("xs"), "lacks 'xs': it has 'ts'"),
        ("ddpm", without("ts"), "lacks 'ts'"),
        ("ddpm", replaced("xs", []), "is empty: 'xs'"),
        ("ddpm", replaced("ts", torch.empty(0, 4)), "is empty: 'ts'"),
        ("ddpm", replaced("ts", torch.tensor(3)), "'ts' as neither"),
        ("ddpm", replaced("ts", 3), "'ts' as neither"),
        ("ddpm", replaced("ts", "abc"), "'ts' as neither"),
        ("ddpm", replaced("xs", [1.0] * STEPS), "'xs' as neither"),
        ("ddpm", replaced("ts", lambda t: t > 100), "'ts' as torch.bool instead of int64, int32 or float"),
        ("ddpm", replaced("ts", lambda t: t.to(torch.complex64)), "'ts' as torch.complex64"),
        ("ddpm", replaced("xs", lambda x: x.long()), "'xs' as torch.int64 instead of float"),
        ("ddpm", replaced("xs", set_nan), "NaN or Inf in 'xs' at step 0"),
        ("ddpm", replaced("ts", set_nan), "NaN or Inf in 'ts' at step 0"),
        ("ddpm", replaced("xs", lambda x: x[:-1]), "5 steps of 'xs', but 6 of 'ts'"),
        ("ddpm", replaced("xs", lambda x: x[..., :4]), "takes \\[3, 8, 8\\]"),
        ("ddpm", replaced("xs", lambda x: x[:, 0]), "holds samples of shape"),
        (
            "ddpm",
            replaced("xs", lambda x: [*listed(x)[:-1], x[-1, :, :2]]),
            "shape of 'xs' differs at step 5",
        ),
        ("ddpm", content(4), "is it from another model"),
        ("ddpm", {**content(), "cs": torch.zeros(STEPS, SAMPLES, 2, 4)}, "takes no encoder_hidden_states"),
        ("sd", content(4), "needs 'encoder_hidden_states'"),
        ("sd", replaced("cs", None, 4, prompts=True), "has 'ucs' but lacks 'cs'"),
        ("sd", replaced("cs", lambda c: c[..., :3], 4, prompts=True), "takes \\[tokens, 16\\]"),
        ("sd", replaced("ucs", lambda c: c[:2], 4, prompts=True), "2 steps of 'ucs', but 6 of 'ts'"),
        ("dit", {**content(4), "cs": torch.zeros(STEPS, SAMPLES, 2, 4)}, "takes no encoder_hidden_states"),
    ],
)
def test_unsound_files_are_refused_in_one_sentence(
    models: dict[str, Path], tmp_path: Path, model: str, made: Any, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        imported(models[model], tmp_path / "file.pt", made)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 7}, "7 steps cannot be chosen from a trajectory of 6"),
        ({"samples": 21}, "holds 20 samples"),
        ({"keep": 0}, "at least 1"),
        ({"samples": -1}, "at least 1"),
    ],
)
def test_more_than_there_is_cannot_be_taken(
    models: dict[str, Path], tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        imported(models["ddpm"], tmp_path / "file.pt", content(), **options)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "missing", "folder"])
def test_what_is_no_pytorch_file_is_refused(models: dict[str, Path], tmp_path: Path, damage: str) -> None:
    file = tmp_path / "file.pt"
    torch.save(content(), file)
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "text": b"xs, ts\n", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(InvalidInputError) as caught:
        import_qdiffusion(models["ddpm"], file, tmp_path / "set")
    assert "\n" not in str(caught.value)
