"""A calibration set gives back what was put in, and is refused when it cannot be trusted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qdeploy.calibration_set.batch import Batch
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.shards import describe, open_shards, shard_files, shard_name
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.store.artifact import Artifact, CalibrationFolder, Checkpoint
from qdeploy.store.builder import Draft
from qdeploy.system.errors import InvalidInputError
from tests.helpers import some_facts
from tests.models import ddpm_folder, stable_diffusion_folder

CALLS = 3


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddpm_folder(tmp_path_factory.mktemp("models") / "ddpm")


@pytest.fixture(scope="module")
def small(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """2 calls of 5 images in 3 shards."""
    output = tmp_path_factory.mktemp("sets") / "small"
    artifact = collect(ddpm, output, keep=2, samples=5, batch=2, steps=4)
    assert isinstance(artifact, Artifact)
    return CalibrationSet.open(artifact.path)


def live_calls(seed: int) -> list[dict[str, Tensor]]:
    """Inputs as a network might see them, of every kind, for 2 images under guidance."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, pooled = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 6, generator=generator)
    calls = []
    for call in range(CALLS):
        half = torch.randn(2, 1, 2, 2, generator=generator)
        calls.append(
            {
                "sample": torch.cat([half, half]),
                "timestep": torch.tensor(900.5 - 100 * call),
                "encoder_hidden_states": embeddings,
                "added_cond_kwargs.text_embeds": pooled,
                "added_cond_kwargs.time_ids": torch.tensor([[8, 8], [8, 8], [9, 9], [9, 9]]),
                "attention_mask": torch.tensor([[True, False]]).expand(4, 2),
                "img_ids": torch.arange(10).reshape(5, 2),
                "drifting": torch.full((4, 1), float(call)),
            }
        )
    return calls


def packed(seed: int, first_image: int = 0) -> dict[str, Tensor]:
    images = torch.tensor([0, 1, 0, 1]) + first_image
    batch = Batch("sample", images, conditional=torch.tensor([False, False, True, True]))
    for call, inputs in enumerate(live_calls(seed)):
        batch.add(call, inputs)
    return batch.pack()


def written(
    path: Path, shards: list[dict[str, Tensor]], sample: str = "sample", model: str = "0" * 64
) -> Path:
    """An artifact with these shards, whatever they hold; the manifest is in order."""
    with Draft(path, CalibrationFolder, {"model": model}) as draft:
        for number, shard in enumerate(shards):
            (draft.content / shard_name(number)).parent.mkdir(exist_ok=True)
            save_file(
                {name: value.contiguous() for name, value in shard.items()},
                draft.content / shard_name(number),
            )
        draft.finish(some_facts(CalibrationFolder, sample=sample))
    return path


def test_every_kind_of_input_comes_back_as_the_network_saw_it(tmp_path: Path) -> None:
    data = CalibrationSet.open(written(tmp_path / "set", [packed(0, 0), packed(1, 2)]))
    assert len(data) == 2 * 2 * 2 * CALLS
    inputs = data.inputs(range(len(data)))
    assert data.conditional is not None
    row = 0
    for seed in (0, 1):
        for live in live_calls(seed):
            for image in (0, 1):
                for conditional in (True, False):
                    assert int(data.images[row]) == 2 * seed + image
                    assert bool(data.conditional[row]) == conditional
                    position = image + 2 * conditional
                    for name, value in live.items():
                        expected = value if value.ndim == 0 or name == "img_ids" else value[position]
                        found = inputs[name] if name == "img_ids" else inputs[name][row]
                        assert torch.equal(found, expected), name
                        assert found.dtype == expected.dtype, name
                    row += 1
    assert (
        data.timesteps.tolist()
        == [900.5] * 4 + [800.5] * 4 + [700.5] * 4 + [900.5] * 4 + [800.5] * 4 + [700.5] * 4
    )


def test_what_repeats_is_stored_once() -> None:
    shard = packed(0)
    assert shard["condition.encoder_hidden_states"].shape == (4, 3, 5)
    assert shard["shared.img_ids"].shape == (5, 2)
    assert shard["input.drifting"].shape == (4 * CALLS, 1)
    batch = Batch("sample", torch.arange(2))
    for call in range(CALLS):
        same = torch.ones(2, 7)
        batch.add(call, {"sample": torch.randn(2, 1), "timestep": torch.tensor([call]), "condition": same})
    assert batch.inputs[0]["condition"] is batch.inputs[2]["condition"]
    assert batch.pack()["condition.condition"].shape == (1, 7)


@given(st.lists(st.integers(0, 9), max_size=12), st.booleans())
def test_rows_come_in_the_order_asked_for(small: CalibrationSet, rows: list[int], as_tensor: bool) -> None:
    inputs = small.inputs(torch.tensor(rows, dtype=torch.long) if as_tensor else rows)
    assert inputs["sample"].shape == (len(rows), 3, 8, 8)
    assert torch.equal(inputs["timestep"], small.timesteps[rows])
    for position, row in enumerate(rows):
        assert torch.equal(inputs["sample"][position], small.inputs([row])["sample"][0])


def test_rows_outside_the_set_do_not_exist(small: CalibrationSet) -> None:
    for row in (-1, len(small)):
        with pytest.raises(IndexError):
            small.inputs([row])


def test_what_is_given_out_can_be_changed_without_harm(small: CalibrationSet) -> None:
    before = small.inputs([0])["sample"].clone()
    small.inputs([0])["sample"].zero_()
    assert torch.equal(small.inputs([0])["sample"], before)


def test_facts_describe_the_rows(small: CalibrationSet) -> None:
    facts = small.facts
    assert facts.rows == len(small) == 10
    assert facts.images == 5
    assert facts.timesteps == sorted(set(small.timesteps.tolist()))
    assert {entry.name: (entry.dtype, entry.shape) for entry in facts.inputs} == {
        "sample": ("float32", [3, 8, 8]),
        "timestep": ("int64", []),
    }


def test_the_rows_run_through_the_network(small: CalibrationSet, ddpm: Path) -> None:
    model = open_model(ddpm)
    denoiser = model.load()
    small.check_fits(model, denoiser)
    assert denoise(denoiser, small.inputs([0, 9])).shape == (2, 3, 8, 8)


def test_little_is_held_in_memory(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory of the process cannot be read here")

    def private() -> int:
        return next(
            int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")
        )

    rows = 256
    shard = {
        "input.sample": torch.zeros(rows, 16, 64, 64),  # 64 MB
        "input.timestep": torch.arange(rows),
        "image": torch.arange(rows),
        "call": torch.zeros(rows, dtype=torch.long),
    }
    path = written(tmp_path / "set", [shard])
    del shard
    before = private()
    data = CalibrationSet.open(path)
    data.inputs([3, 200])
    assert private() - before < 32 * 1024


def changed(**changes: Any) -> list[dict[str, Tensor]]:
    """Two shards, the second one changed; a change is a tensor, None for removal, or a function."""
    shards = [packed(0, 0), packed(1, 2)]
    for name, change in changes.items():
        key = name.replace("__", ".")
        if change is None:
            del shards[1][key]
        else:
            shards[1][key] = change(shards[1][key]) if isinstance(change, Callable) else change
    return shards


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input__timestep": lambda t: t > 800}, "timesteps of torch.bool"),
        ({"input__timestep": lambda t: t.to(torch.complex64)}, "timesteps of torch.complex64"),
        ({"input__timestep": lambda t: t.to(torch.int16)}, "timesteps of torch.int16"),
        ({"input__timestep": lambda t: t[:, None]}, "not one per row"),
        ({"input__timestep": None}, "lacks 'input.timestep'"),
        ({"input__timestep": lambda t: t.double()}, "do not fit together"),
        ({"input__timestep": with_nan}, "NaN or Inf in 'input.timestep'"),
        ({"input__sample": with_nan}, "NaN or Inf in 'input.sample'"),
        ({"input__sample": lambda x: x / 0}, "NaN or Inf in 'input.sample'"),
        ({"condition__encoder_hidden_states": with_nan}, "NaN or Inf in 'condition.encoder_hidden_states'"),
        ({"input__sample": lambda x: x[..., :1]}, "do not fit together"),
        ({"input__sample": lambda x: x[1:]}, "contradicts itself"),
        ({"input__sample": None}, "do not fit together"),
        ({"image": lambda n: n[1:]}, "contradicts itself"),
        ({"image": lambda n: n.float()}, "'image' as torch.float32"),
        ({"condition_row": lambda n: n + 1}, "points nowhere"),
        ({"condition_row": None}, "lacks 'condition_row'"),
        ({"conditional": None}, "do not fit together"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "set", changed(**changes))
    with pytest.raises(InvalidInputError, match=message):
        CalibrationSet.open(path)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is empty"):
        CalibrationSet.open(written(tmp_path / "none", []))
    no_rows = {
        name: value[:0]
        for name, value in packed(0).items()
        if "condition" not in name and "shared" not in name
    }
    with pytest.raises(InvalidInputError, match="is empty"):
        CalibrationSet.open(written(tmp_path / "no-rows", [no_rows]))


def test_a_set_that_does_not_name_its_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="noisy sample"):
        CalibrationSet.open(written(tmp_path / "set", [packed(0)], sample="hidden_states"))


def test_foreign_folders_and_files_are_refused(tmp_path: Path, ddpm: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        CalibrationSet.open(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="not a qdeploy artifact"):
        CalibrationSet.open(ddpm)
    with Draft(tmp_path / "checkpoint", Checkpoint, {}) as draft:
        draft.finish(some_facts())
    with pytest.raises(InvalidInputError, match="of kind 'checkpoint'"):
        CalibrationSet.open(tmp_path / "checkpoint")


def test_a_pickle_is_not_read_but_its_importer_named(tmp_path: Path) -> None:
    file = tmp_path / "bedroom.pt"
    file.write_bytes(pickle.dumps({"xs": 1}))
    with pytest.raises(InvalidInputError, match=r"qdeploy collect MODEL --from-qdiffusion FILE"):
        CalibrationSet.open(file)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "set", [packed(0)])
    shard = path / shard_name(0)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InvalidInputError, match="does not match its recorded hash"):
        CalibrationSet.open(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    with Draft(tmp_path / "set", CalibrationFolder, {}) as draft:
        draft.content.joinpath(shard_name(0)).write_bytes(b"not safetensors at all")
        draft.finish(some_facts(CalibrationFolder))
    with pytest.raises(InvalidInputError, match="is damaged"):
        CalibrationSet.open(tmp_path / "set")


def test_a_set_of_another_model_does_not_fit(small: CalibrationSet, ddpm: Path, tmp_path: Path) -> None:
    other = open_model(ddpm_folder(tmp_path / "other", seed=1))
    with pytest.raises(InvalidInputError, match="made from another model"):
        small.check_fits(other, other.load())


def test_inputs_that_the_network_cannot_take_do_not_fit(ddpm: Path, tmp_path: Path) -> None:
    model = open_model(ddpm)
    rows = {
        "input.timestep": torch.tensor([5]),
        "image": torch.tensor([0]),
        "call": torch.tensor([0]),
    }
    wrong = {
        "channels": ({**rows, "input.sample": torch.zeros(1, 4, 8, 8)}, "sample"),
        "names": (
            {**rows, "input.sample": torch.zeros(1, 3, 8, 8), "input.depth": torch.zeros(1, 1)},
            "sample",
        ),
        "role": ({**rows, "input.hidden_states": torch.zeros(1, 3, 8, 8)}, "hidden_states"),
    }
    for name, (shard, sample) in wrong.items():
        data = CalibrationSet.open(written(tmp_path / name, [shard], sample, model.sha256))
        with pytest.raises(InvalidInputError, match=r"does not fit|has an input"):
            data.check_fits(model, model.load())


def test_prompted_sets_fit_their_model(tmp_path: Path) -> None:
    model = open_model(stable_diffusion_folder(tmp_path / "sd"))
    artifact = collect(model, tmp_path / "set", keep=1, samples=1, steps=2, prompts=["a"])
    assert isinstance(artifact, Artifact)
    CalibrationSet.open(artifact.path).check_fits(model, model.load())


def test_an_input_that_changes_without_a_batch_dimension_is_refused() -> None:
    batch = Batch("sample", torch.arange(2))
    for call in range(2):
        batch.add(call, {"sample": torch.zeros(2, 1), "timestep": torch.tensor(1), "odd": torch.tensor(call)})
    with pytest.raises(InvalidInputError, match="'odd' changes"):
        batch.pack()


def test_calls_with_other_inputs_are_refused() -> None:
    batch = Batch("sample", torch.arange(2))
    batch.add(0, {"sample": torch.zeros(2, 1), "timestep": torch.tensor(1)})
    with pytest.raises(InvalidInputError, match="other inputs"):
        batch.add(1, {"sample": torch.zeros(2, 1), "timestep": torch.tensor(1), "more": torch.zeros(2)})


def test_a_timestep_per_token_is_refused() -> None:
    batch = Batch("sample", torch.arange(2))
    batch.add(0, {"sample": torch.zeros(2, 1), "timestep": torch.zeros(2, 7)})
    with pytest.raises(InvalidInputError, match="one t per row"):
        batch.pack()


def test_guided_rows_of_unknown_order_are_said_to_be_so(tmp_path: Path) -> None:
    batch = Batch("sample", torch.tensor([0, 1, 0, 1]))
    half = torch.randn(2, 1)
    batch.add(0, {"sample": torch.cat([half, half]), "timestep": torch.tensor(1)})
    path = written(tmp_path / "set", [batch.pack()])
    shards = open_shards(path, shard_files(path))
    assert describe(shards, "sample", scheduler=None, inference_steps=1, guidance=None).pairs == "undecided"
    data = CalibrationSet.open(path)
    assert data.conditional is None
    assert data.images.tolist() == [0, 0, 1, 1]
