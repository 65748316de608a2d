"""A calibration set holds what the denoiser really sees, costs one pass, and is the same every time."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qdeploy.calibration_set import collecting as trajectory
from qdeploy.calibration_set.batch import Batch
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.recorder import chosen_calls, conditional_half
from qdeploy.model.folder import Model, open_model
from qdeploy.model.inputs import flatten_inputs
from qdeploy.model.pipeline import generate, sample_images
from qdeploy.model.schedulers import make_scheduler
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.estimate import Estimate
from tests.models import ddpm_folder, dit_folder, stable_diffusion_folder

PROMPTS = ["a cat", "a red dog", "7 houses"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    fractional = stable_diffusion_folder(folder / "fractional")
    config = fractional / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "linspace"}))
    return {
        "ddpm": ddpm_folder(folder / "ddpm"),
        "sd": stable_diffusion_folder(folder / "sd"),
        "dit": dit_folder(folder / "dit"),
        "fractional": fractional,
    }


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The denoisers that were loaded, each counting in ``calls`` how often it was computed."""
    denoisers: list[Any] = []
    load = Model.load

    def counting(self: Model, device: str = "cpu") -> nn.Module:
        denoiser: Any = load(self, device)
        denoiser.calls = 0
        first = next(module for module in denoiser.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(lambda *_: setattr(denoiser, "calls", denoiser.calls + 1))
        denoisers.append(denoiser)
        return denoiser

    monkeypatch.setattr(Model, "load", counting)
    return denoisers


def collected(model: Path, output: Path, **options: Any) -> CalibrationSet:
    artifact = collect(model, output, **options)
    assert isinstance(artifact, Artifact)
    return CalibrationSet.open(artifact.path)


def watched(model: Path, seeds: list[int], scheduler: str | None, **options: Any) -> list[dict[str, Tensor]]:
    """Inputs of every denoiser call of a stock pipeline, by a hook that shares no code with `Recorder`."""
    pipeline = open_model(model).pipeline()
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    calls = []
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            {name: value.clone() for name, value in flatten_inputs(module, args, kwargs).items()}
        ),
        with_kwargs=True,
    )
    generate(pipeline, seeds, **options)
    return calls


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddpm", None),
        ("ddpm", "ddim"),
        ("ddpm", "pndm"),
        ("ddpm", "dpm++"),
        ("sd", None),
        ("sd", "euler"),
        ("sd", "euler-ancestral"),
        ("sd", "heun"),
        ("sd", "dpm++"),
        ("fractional", "euler"),
        ("fractional", "heun"),
        ("dit", None),
    ],
)
def test_rows_are_what_a_hook_on_the_live_network_sees(
    models: dict[str, Path], tmp_path: Path, name: str, scheduler: str | None
) -> None:
    prompts = {"ddpm": None, "dit": ["3", "14", "159"]}.get(name, PROMPTS)
    data = collected(
        models[name],
        tmp_path / "set",
        keep=4,
        samples=3,
        steps=7,
        scheduler=scheduler,
        prompts=prompts,
        seed=5,
    )
    seen = watched(models[name], [5, 6, 7], scheduler, steps=7, prompts=prompts)

    calls = torch.cat([shard.tensor("call") for shard in data._shards])
    assert sorted(set(calls.tolist())) == chosen_calls(len(seen), 4)
    guided = data.conditional is not None
    assert guided == (name != "ddpm")
    assert len(data) == 4 * 3 * (2 if guided else 1)
    inputs = data.inputs(range(len(data)))
    first_half_is_conditional = name == "dit"
    for row in range(len(data)):
        live = seen[int(calls[row])]
        position = int(data.images[row])
        if data.conditional is not None and bool(data.conditional[row]) != first_half_is_conditional:
            position += 3
        assert inputs.keys() == live.keys()
        for key, value in live.items():
            expected = value[position] if key != "timestep" else value.reshape(-1).expand(6)[position]
            assert inputs[key].dtype == value.dtype
            assert torch.equal(inputs[key][row], expected), key


def test_every_step_has_equally_many_rows(models: dict[str, Path], tmp_path: Path) -> None:
    data = collected(models["ddpm"], tmp_path / "set", keep=5, samples=5, steps=11, batch=2)
    _, counts = data.timesteps.unique(return_counts=True)
    assert counts.tolist() == [5] * 5
    _, counts = data.images.unique(return_counts=True)
    assert counts.tolist() == [5] * 5


def test_guided_rows_come_in_pairs_that_share_sample_and_t(models: dict[str, Path], tmp_path: Path) -> None:
    data = collected(models["sd"], tmp_path / "set", keep=3, samples=3, steps=5, batch=2, prompts=PROMPTS)
    inputs, conditional = data.inputs(range(len(data))), data.conditional
    assert conditional is not None
    assert conditional.tolist() == [True, False] * 9
    assert torch.equal(inputs["sample"][0::2], inputs["sample"][1::2])
    assert torch.equal(inputs["timestep"][0::2], inputs["timestep"][1::2])
    assert torch.equal(data.images[0::2], data.images[1::2])
    empty = inputs["encoder_hidden_states"][1::2]
    assert torch.equal(empty, empty[:1].expand_as(empty))


def test_conditions_are_stored_once_not_per_row(models: dict[str, Path], tmp_path: Path) -> None:
    data = collected(models["sd"], tmp_path / "set", keep=5, samples=4, steps=5, prompts=PROMPTS)
    assert len(data) == 40
    assert len(data._shards[0].tensor("condition.encoder_hidden_states")) == len({*PROMPTS}) + 1


def test_without_guidance_there_are_no_pairs(models: dict[str, Path], tmp_path: Path) -> None:
    data = collected(
        models["sd"], tmp_path / "set", keep=2, samples=2, steps=4, prompts=PROMPTS, guidance=1.0
    )
    assert len(data) == 4
    assert data.conditional is None
    assert data.facts.pairs is None


@given(st.floats(1.1, 20), st.booleans(), st.floats(0.5, 2), st.integers(0, 1000), st.booleans())
def test_the_conditional_half_is_told_from_what_guidance_makes_of_the_two(
    guidance: float, conditional_first: bool, rescale: float, seed: int, learned_variance: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    unconditional = torch.randn(2, 4, 3, 3, generator=generator)
    conditional = unconditional + 1e-2 * torch.randn(2, 4, 3, 3, generator=generator)
    guided = rescale * (unconditional + guidance * (conditional - unconditional))
    halves = [conditional, unconditional] if conditional_first else [unconditional, conditional]
    prediction = torch.cat(halves)
    guided = guided[:, :2] if learned_variance else guided
    assert conditional_half(prediction, guided) == (0 if conditional_first else 1)


def test_halves_that_cannot_be_told_apart_are_said_to_be_undecided() -> None:
    same = torch.randn(2, 4, 3, 3)
    assert conditional_half(torch.cat([same, same]), same) is None
    assert conditional_half(torch.randn(4, 4, 3, 3), torch.randn(2, 4, 3, 3)) is None


@given(st.integers(1, 1100), st.data())
def test_steps_are_exactly_as_many_as_asked_for_and_evenly_spread(calls: int, data: Any) -> None:
    steps = data.draw(st.integers(1, calls))
    chosen = chosen_calls(calls, steps)
    assert len(set(chosen)) == steps
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert steps == 1 or chosen[-1] == calls - 1
    gaps = {after - before for before, after in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_25_of_51_calls_are_25(models: dict[str, Path], tmp_path: Path) -> None:
    data = collected(models["sd"], tmp_path / "set", keep=25, samples=1, steps=50, prompts=PROMPTS)
    assert data.facts.steps == 25
    assert len(data) == 50


def test_fractional_timesteps_are_kept(models: dict[str, Path], tmp_path: Path) -> None:
    data = collected(
        models["fractional"],
        tmp_path / "set",
        keep=7,
        samples=1,
        steps=7,
        scheduler="euler",
        prompts=PROMPTS,
    )
    assert data.timesteps.is_floating_point()
    assert 166.5 in data.facts.timesteps
    assert 166.5 in data.timesteps.tolist()


@pytest.mark.parametrize(
    ("scheduler", "calls"), [("ddim", 10), (None, 11), ("heun", 19), ("euler", 10), ("dpm++", 10)]
)
def test_each_image_batch_costs_one_pass(
    models: dict[str, Path], tmp_path: Path, loaded: list[Any], scheduler: str | None, calls: int
) -> None:
    collect(
        models["sd"],
        tmp_path / "set",
        keep=6,
        samples=4,
        batch=2,
        steps=10,
        scheduler=scheduler,
        prompts=PROMPTS,
    )
    looked = 2  # one call to look at, and its repetition
    assert [denoiser.calls for denoiser in loaded] == [2 * calls + looked]
    assert not any(module.training for module in loaded[0].modules())


def test_nothing_is_decoded(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    def decode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the VAE was run")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    collect(models["sd"], tmp_path / "set", keep=2, samples=2, steps=3, prompts=PROMPTS)


def test_no_more_than_one_image_batch_is_held(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    most, batches = 0, 0
    add, pack = Batch.add, Batch.pack

    def alive() -> int:
        return sum(reference() is not None for reference in held)

    def watched_add(self: Batch, call: int, inputs: Any, branch: int = 0) -> None:
        nonlocal most
        add(self, call, inputs, branch)
        held.extend(weakref.ref(value) for value in self.inputs[-1].values())
        most = max(most, alive())

    def watched_pack(self: Batch) -> dict[str, Tensor]:
        nonlocal batches
        batches += 1
        packed = pack(self)
        held.extend(weakref.ref(value) for value in packed.values())
        return packed

    monkeypatch.setattr(Batch, "add", watched_add)
    monkeypatch.setattr(Batch, "pack", watched_pack)
    gc.disable()  # reference counts alone have to let go of a batch
    try:
        collect(models["ddpm"], tmp_path / "set", keep=5, samples=8, batch=2, steps=6)
    finally:
        gc.enable()
    assert batches >= 4
    assert most <= 5 * 2 + 4, "5 calls of 2 inputs each, and at most one packed shard beside them"


def test_same_request_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "keep": 3,
        "samples": 5,
        "batch": 2,
        "steps": 6,
        "scheduler": "ddpm",
    }
    torch.manual_seed(1)
    first = collected(models["dit"], tmp_path / "first", **options)
    torch.manual_seed(2)
    moved = shutil.copytree(models["dit"], tmp_path / "elsewhere")
    again = collected(moved, tmp_path / "again", **options)
    other = collected(models["dit"], tmp_path / "other", **options, seed=1)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_the_global_random_state_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    collect(models["ddpm"], tmp_path / "set", keep=1, samples=1, steps=2)
    assert torch.equal(torch.rand(1), expected)


def test_images_do_not_depend_on_the_batch(models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 3, "samples": 4, "steps": 6}
    one = collected(models["ddpm"], tmp_path / "one", batch=1, **options)
    four = collected(models["ddpm"], tmp_path / "four", batch=4, **options)
    for image in range(4):
        mine, theirs = (data.inputs((data.images == image).nonzero().flatten()) for data in (one, four))
        torch.testing.assert_close(mine["sample"], theirs["sample"], rtol=1e-4, atol=1e-4)
        assert torch.equal(mine["timestep"], theirs["timestep"])


def test_an_interrupted_collection_continues_where_it_stopped(
    models: dict[str, Path], tmp_path: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"keep": 2, "samples": 6, "batch": 2, "steps": 5}
    whole = collected(models["ddpm"], tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(trajectory, "sample_images", _interrupted(sample_images, after=4))
        with pytest.raises(KeyboardInterrupt):
            collect(models["ddpm"], tmp_path / "set", **options)
    # what a kill in the middle of a write leaves behind
    (parts,) = (tmp_path / ".set.parts").glob("*/parts")
    (parts / ".000002.4711").mkdir()
    (parts / ".000002.4711" / "rows-00002.safetensors").write_bytes(b"half")
    again = collected(models["ddpm"], tmp_path / "set", **options)
    assert again.sha256 == whole.sha256
    assert [denoiser.calls for denoiser in loaded] == [17, 12, 7]  # the look at the pipeline takes two each
    assert not (tmp_path / ".set.work").exists()
    assert not (tmp_path / ".set.parts").exists()


def _interrupted(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from qdeploy.calibration_set.collect import collect
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # before the fork: a child starts at once

model, output = Path(sys.argv[1]), Path(sys.argv[2])
parts = output.parent / f".{output.name}.parts"

def there():
    return len(list(parts.glob("*/parts/[0-9]*")))

random.seed(0)
kills = 0
for _ in range(4):
    before = there()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        collect(model, output, keep=3, samples=20, batch=2, steps=20)
        os._exit(0)
    while there() <= before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    if output.exists():
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_set(models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 3, "samples": 20, "batch": 2, "steps": 20}  # as in KILLER
    script = subprocess.run(
        [sys.executable, "-c", KILLER, str(models["ddpm"]), str(tmp_path / "set")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert script.returncode == 0, script.stderr
    assert int(script.stdout) > 1, "the kills came too late"
    resumed = collected(models["ddpm"], tmp_path / "set", **options)
    whole = collected(models["ddpm"], tmp_path / "whole", **options)
    assert resumed.sha256 == whole.sha256


def test_finished_work_is_returned_without_loading_the_model(
    models: dict[str, Path], tmp_path: Path, loaded: list[Any]
) -> None:
    options: dict[str, Any] = {"keep": 2, "samples": 2, "steps": 4}
    first = collect(models["ddpm"], tmp_path / "set", **options)
    again = collect(models["ddpm"], tmp_path / "set", **options)
    assert again == first
    assert len(loaded) == 1


def test_another_request_does_not_overwrite_by_itself(models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 2, "steps": 4}
    collect(models["ddpm"], tmp_path / "set", keep=2, **options)
    with pytest.raises(UsageError, match="--overwrite"):
        collect(models["ddpm"], tmp_path / "set", keep=3, **options)
    assert collected(models["ddpm"], tmp_path / "set", keep=3, overwrite=True, **options).facts.steps == 3


def test_a_changed_text_encoder_makes_another_set(models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 1, "samples": 1, "steps": 2, "prompts": PROMPTS}
    changed = shutil.copytree(models["sd"], tmp_path / "changed")
    other = stable_diffusion_folder(tmp_path / "other", seed=1)
    shutil.copytree(other / "text_encoder", changed / "text_encoder", dirs_exist_ok=True)
    collect(models["sd"], tmp_path / "set", **options)
    with pytest.raises(UsageError, match="another artifact"):
        collect(changed, tmp_path / "set", **options)


def test_a_dry_run_writes_nothing_and_foretells_the_size(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "keep": 10,
        "samples": 6,
        "batch": 4,
        "steps": 12,
        "prompts": PROMPTS,
    }
    estimate = collect(models["sd"], tmp_path / "set", dry_run=True, **options)
    assert isinstance(estimate, Estimate)
    assert estimate.seconds > 0
    assert not list(tmp_path.iterdir())
    assert "10 of 13 denoiser calls for 6 images" in capsys.readouterr().err
    data = collected(models["sd"], tmp_path / "set", **options)
    size = sum(path.stat().st_size for path in data.artifact.path.glob("rows-*"))
    assert 0.8 * size < estimate.bytes < 1.2 * size


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"keep": 0}, "keep must be at least 1"),
        ("ddpm", {"samples": -1}, "samples must be at least 1"),
        ("ddpm", {"batch": 0}, "batch must be at least 1"),
        ("ddpm", {"steps": 0}, "steps must be at least 1"),
        ("ddpm", {"keep": 21, "steps": 20}, "21 steps cannot be chosen from a trajectory of 20"),
        ("ddpm", {"steps": 1001}, "cannot make 1001 sampling steps"),
        ("ddpm", {"scheduler": "no-such"}, "unknown scheduler"),
        ("ddpm", {"prompts": PROMPTS}, "takes no prompts"),
        ("ddpm", {"scheduler": "pndm", "eta": 0.5}, "PNDMScheduler takes no eta"),
        ("ddpm", {"seed": 2**64}, "seed"),
        ("sd", {}, "needs prompts"),
        ("sd", {"prompts": []}, "list of prompts is empty"),
        ("sd", {"prompts": PROMPTS, "keep": 52, "steps": 50}, "trajectory of 51"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_loaded(
    models: dict[str, Path],
    tmp_path: Path,
    loaded: list[Any],
    name: str,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        collect(models[name], tmp_path / "set", **options)
    assert not loaded
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"guidance": 3.0}, "guidance_scale"),
        ("ddpm", {"height": 64}, "height"),
        ("ddpm", {"scheduler": "euler"}, "does not scale its samples"),
        ("ddpm", {"scheduler": "heun"}, "does not scale its samples"),
        ("dit", {"prompts": ["a cat"]}, "class numbers"),
    ],
)
def test_what_only_the_pipeline_knows_is_refused_in_one_sentence(
    models: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        collect(models[name], tmp_path / "set", samples=1, keep=2, steps=4, **options)
    assert not list(tmp_path.iterdir())


def test_a_network_that_makes_nan_is_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Model.load

    def broken(self: Model, device: str = "cpu") -> nn.Module:
        denoiser = load(self, device)
        denoiser.get_submodule("conv_out").register_forward_hook(
            lambda module, args, output: output * torch.nan
        )
        return denoiser

    monkeypatch.setattr(Model, "load", broken)
    with pytest.raises(InvalidInputError, match="NaN or Inf in call 1"):
        collect(models["ddpm"], tmp_path / "set", samples=1, keep=4, steps=4)


def test_a_denoiser_without_a_pipeline_cannot_be_sampled(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="denoiser alone"):
        collect(models["ddpm"] / "unet", tmp_path / "set")
