from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qdeploy.engines.build import build_engine
from qdeploy.model.prompts import LIMIT, read_prompts
from qdeploy.sampling import sample as module
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact, open_artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.helpers import reseal

FEW: dict[str, Any] = {"samples": 5, "steps": 3, "batch": 2, "scheduler": "ddim"}


def images_of(artifact: Artifact) -> torch.Tensor:
    return load_file(artifact.file("images.safetensors"))["images"]


def test_equal_requests_give_equal_bytes(ddpm_engine: Artifact, tmp_path: Path) -> None:
    first = sample(ddpm_engine, tmp_path / "first", **FEW)
    second = sample(ddpm_engine.path, tmp_path / "second", **FEW)
    assert first.sha256 == second.sha256
    assert first.kind == "samples"
    open_artifact(first.path)
    assert sample(ddpm_engine, tmp_path / "first", **FEW).manifest == first.manifest  # found, not made again


def test_an_engine_samples_what_its_model_samples(ddpm: Path, ddpm_engine: Artifact, tmp_path: Path) -> None:
    mine, torchs = (images_of(sample(s, tmp_path / n, **FEW)) for s, n in ((ddpm_engine, "e"), (ddpm, "m")))
    assert mine.shape == torchs.shape == (5, 3, 8, 8)
    assert mine.dtype == torch.uint8
    assert (mine.int() - torchs.int()).abs().max() <= 1


def test_images_depend_on_their_seeds_and_not_on_the_batch(ddpm_engine: Artifact, tmp_path: Path) -> None:
    small = images_of(sample(ddpm_engine, tmp_path / "small", seed=10, **FEW))
    large = images_of(sample(ddpm_engine, tmp_path / "large", seed=10, **{**FEW, "batch": 5}))
    later = images_of(sample(ddpm_engine, tmp_path / "later", seed=12, **FEW))
    assert (small.int() - large.int()).abs().max() <= 1
    assert (small[2:].int() - later[:3].int()).abs().max() <= 1
    assert (small[0].int() - small[1].int()).abs().max() > 10


def test_pictures_carry_how_they_were_made(ddpm_engine: Artifact, tmp_path: Path) -> None:
    artifact = sample(ddpm_engine, tmp_path / "samples", seed=100, **FEW)
    images = images_of(artifact)
    for number in range(5):
        with Image.open(artifact.file(f"{number:05d}.png")) as picture:
            assert picture.text == {
                "seed": str(100 + number),
                "scheduler": "DDIMScheduler",
                "steps": "3",
                "engine": ddpm_engine.sha256,
            }
            assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), images[number].numpy())
    with Image.open(artifact.file("grid.png")) as grid:
        assert grid.size == (3 * 8, 2 * 8)
        assert np.array_equal(np.asarray(grid)[8:, 8:16].transpose(2, 0, 1), images[4].numpy())
        assert np.asarray(grid)[8:, 16:].max() == 0
    assert artifact.made_from["engine"] == ddpm_engine.sha256
    assert artifact.facts.steps == 3


def test_prompts_are_used_in_turns_and_written_down(stable_diffusion: Path, tmp_path: Path) -> None:
    artifact = sample(
        stable_diffusion,
        tmp_path / "samples",
        samples=3,
        steps=2,
        batch=2,
        prompts=["a cat", "zwölf 猫"],
        guidance=3.0,
    )
    texts = [Image.open(artifact.file(f"{number:05d}.png")).text["prompt"] for number in range(3)]
    assert texts == ["a cat", "zwölf 猫", "a cat"]
    with pytest.raises(UsageError, match="needs prompts"):
        sample(stable_diffusion, tmp_path / "none", samples=1, steps=2)


def test_an_interrupted_run_goes_on_where_it_was(
    ddpm_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(ddpm_engine, tmp_path / "whole", **FEW)
    sample_images, made = module.sample_images, []

    def stop_after_two(pipeline: Any, sampling: Any, images: Any) -> torch.Tensor:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(images))
        return sample_images(pipeline, sampling, images)

    monkeypatch.setattr(module, "sample_images", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        sample(ddpm_engine, tmp_path / "samples", **FEW)
    assert not (tmp_path / "samples").exists()
    assert made == [[0, 1], [2, 3]]
    made.clear()
    resumed = sample(ddpm_engine, tmp_path / "samples", **FEW)
    assert made == [[4]]
    assert resumed.sha256 == whole.sha256


# -- the pipeline around an engine -------------------------------------------------------------------------


@pytest.fixture
def movable(ddpm: Path, ddpm_engine: Artifact, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the model and of its engine, whose note points to the model's copy."""
    shutil.copytree(ddpm, tmp_path / "model")
    shutil.copytree(ddpm_engine.path, tmp_path / "engine")
    _point_to(tmp_path / "engine", tmp_path / "model")
    return tmp_path / "model", tmp_path / "engine"


def _point_to(engine: Path, model: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["notes"]["source"] = str(model)

    reseal(engine, change)


def used(artifact: Artifact) -> str:
    return str(artifact.manifest.notes.pipeline)


def test_the_model_it_was_made_from_comes_first(movable: tuple[Path, Path], tmp_path: Path) -> None:
    model, engine = movable
    assert used(sample(engine, tmp_path / "samples", **FEW)) == str(model)


def test_a_changed_or_lost_model_is_not_used(movable: tuple[Path, Path], tmp_path: Path) -> None:
    model, engine = movable
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"changed": 1}))
    changed = sample(engine, tmp_path / "changed", **FEW)
    shutil.rmtree(model)
    lost = sample(engine, tmp_path / "lost", **FEW)
    assert used(changed) == used(lost) == str(engine)
    assert changed.sha256 == lost.sha256


def test_a_named_model_is_taken(ddpm: Path, movable: tuple[Path, Path], tmp_path: Path) -> None:
    assert used(sample(movable[1], tmp_path / "samples", model=ddpm, **FEW)) == str(ddpm)


def test_without_a_pipeline_the_user_is_asked_for_one(
    stable_diffusion_bundle: Artifact, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    build_engine(stable_diffusion_bundle, engine, threads=1, pipeline=False)
    _point_to(engine, tmp_path / "gone")
    with pytest.raises(InvalidInputError, match="--model") as error:
        sample(engine, tmp_path / "samples", samples=1, steps=2, prompts=["a cat"])
    assert error.value.exit_code == 5


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"steps": -1}, {"batch": 0}, {"prompts": []}, {"scheduler": "x"}]
)
def test_impossible_wishes_are_usage_errors(
    ddpm_engine: Artifact, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as error:
        sample(ddpm_engine, tmp_path / "samples", **{**FEW, **wrong})
    assert error.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_model_cannot_take_is_invalid(stable_diffusion: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="divisible by 8"):
        sample(stable_diffusion, tmp_path / "samples", samples=1, steps=2, prompts=["a"], height=12, width=12)


def test_a_denoiser_alone_cannot_sample(ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="whole pipeline"):
        sample(ddpm / "unet", tmp_path / "samples", **FEW)


def test_a_graph_is_no_engine(ddpm_engine: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="kind 'onnx', but 'engine or checkpoint'"):
        sample(ddpm_engine.path.parent / "onnx", tmp_path / "samples", **FEW)


def test_images_as_one_array_for_the_evaluation_suite_of_adm(ddpm_engine: Artifact, tmp_path: Path) -> None:
    artifact = sample(ddpm_engine, tmp_path / "samples", npz=True, **FEW)
    with np.load(artifact.file("images.npz")) as arrays:
        assert list(arrays) == ["arr_0"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], images_of(artifact).permute(0, 2, 3, 1).numpy())
    again = sample(ddpm_engine, tmp_path / "again", npz=True, **FEW)
    assert again.sha256 == artifact.sha256


def test_images_in_shards_hold_what_single_files_do(ddpm_engine: Artifact, tmp_path: Path) -> None:
    single = sample(ddpm_engine, tmp_path / "single", **FEW)
    packed = sample(ddpm_engine, tmp_path / "packed", shards=4, **FEW)
    assert sorted(file.name for file in packed.path.glob("*.*")) == [
        *("grid.png", "images.safetensors", "qdeploy.json", "shard-000000.tar", "shard-000001.tar"),
    ]
    found: dict[str, bytes] = {}
    for shard, count in (("shard-000000.tar", 4), ("shard-000001.tar", 1)):
        with tarfile.open(packed.file(shard)) as archive:
            members = archive.getmembers()
            assert len(members) == 2 * count
            for member in members:
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    for number in range(5):
        assert found[f"{number:05d}.png"] == single.file(f"{number:05d}.png").read_bytes()
        assert json.loads(found[f"{number:05d}.json"])["seed"] == number
    assert sample(ddpm_engine, tmp_path / "again", shards=4, **FEW).sha256 == packed.sha256
    assert torch.equal(images_of(packed), images_of(single))


def test_shards_have_prompts_as_files(stable_diffusion: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", "größer als\nzwei"]
    made = sample(stable_diffusion, tmp_path / "made", shards=8, samples=3, steps=2, prompts=prompts)
    with tarfile.open(made.file("shard-000000.tar")) as archive:
        texts = [archive.extractfile(f"{number:05d}.txt") for number in range(3)]
        assert [text.read().decode() for text in texts if text] == [*prompts, prompts[0]]


def test_a_shard_of_nothing_is_refused(ddpm_engine: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 image at least"):
        sample(ddpm_engine, tmp_path / "samples", shards=0, **FEW)
    assert not list(tmp_path.iterdir())


def test_many_prompts_are_named_by_their_hash(stable_diffusion: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {number}\n" for number in range(LIMIT + 1)))
    many = read_prompts(file, LIMIT + 1)
    made = sample(stable_diffusion, tmp_path / "made", samples=2, steps=2, prompts=many)
    assert made.facts.prompts is None
    assert made.facts.prompt_file is not None
    assert made.facts.prompt_file.count == LIMIT + 1
    assert made.path.joinpath("qdeploy.json").stat().st_size < 20_000
    with Image.open(made.file("00001.png")) as picture:
        assert picture.text["prompt"] == "prompt 1"
