"""What a pipeline passes its denoiser is recorded whole, or refused before anything is recorded."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.survey import survey
from qdeploy.model.call import read_call, signature_of
from qdeploy.model.folder import Model, open_model
from qdeploy.model.inputs import denoise
from qdeploy.model.pipeline import generate
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError
from tests.models.catalogue import ENTRIES
from tests.models.field import (
    cogvideox_folder,
    consistency_folder,
    lcm_folder,
    ltx_folder,
    prior_folder,
    video_folder,
    wan_folder,
)
from tests.models.pipelines import ddpm_folder, stable_diffusion_folder

SMALL: dict[str, Any] = {"samples": 2, "keep": 2, "steps": 3, "batch": 2}
PROMPTS = ["a cat", "two dogs"]


def live(model: Model, count: int, **options: Any) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Tensors and prediction of every denoiser call, by a wrapper that shares no code with what records."""
    pipeline = model.pipeline()
    denoiser = getattr(pipeline, model.component)
    stock, seen = denoiser.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        names = dict(zip(signature_of(stock.__self__).parameters, args, strict=False)) | kwargs
        output = stock(*args, **kwargs)
        seen.append((names, (output if isinstance(output, Tensor) else output[0]).clone()))
        return output

    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser.forward = forward
        generate(pipeline, range(count), 3, **options)
    return seen


def collected(folder: Path, output: Path, **options: Any) -> CalibrationSet:
    made = collect(folder, output, **{**SMALL, **options})
    assert isinstance(made, Artifact)
    return CalibrationSet.open(made.path)


FIELD: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "a tuple of tensors": (
        cogvideox_folder,
        {"prompts": PROMPTS, "guidance": 3.0, "height": 16, "width": 16},
    ),
    "integers": (ltx_folder, {"prompts": PROMPTS, "guidance": 3.0, "height": 32, "width": 32}),
    "two calls a step": (wan_folder, {"prompts": PROMPTS, "guidance": 3.0, "height": 16, "width": 16}),
    "guidance as a condition": (lcm_folder, {"prompts": PROMPTS, "guidance": 8.0}),
    "class labels": (consistency_folder, {"prompts": ["1", "2"]}),
    "a bool mask": (prior_folder, {"prompts": PROMPTS, "guidance": 3.0}),
    "frames": (video_folder, {"prompts": PROMPTS, "guidance": 3.0}),
}


@pytest.mark.parametrize("kind", FIELD)
def test_recorded_calls_repeat_what_the_pipeline_computed(kind: str, tmp_path: Path) -> None:
    make, options = FIELD[kind]
    model = open_model(make(tmp_path / "model"))
    data = collected(model.path, tmp_path / "set", **options)
    denoiser = model.load()
    data.check_fits(model, denoiser)
    seen = live(model, 2, **options)
    images = data.images.unique()
    branches = max(1, len(seen) // 3)
    for step, call in enumerate((0, 2)):  # the first and the last of three steps
        for branch in range(branches):
            _, prediction = seen[call * branches + branch]
            rows = len(prediction) // len(images)
            first = (step * branches + branch) * len(prediction)
            with torch.no_grad():
                found = denoise(denoiser, data.inputs(range(first, first + len(prediction))))
            # Rows lie image by image, conditional first; the pipeline has them half by half.
            expected = {tuple(row.flatten().tolist()) for row in prediction}
            if rows == 1:
                assert torch.allclose(found, prediction, atol=1e-5), (kind, step, branch)
            near = torch.cdist(found.flatten(1), prediction.flatten(1)).amin(1)
            assert float(near.max()) < 1e-3, (kind, step, branch)
            assert len(expected) == len(prediction)


def test_the_branches_of_guidance_are_recorded_each_and_told_apart(tmp_path: Path) -> None:
    make, options = FIELD["two calls a step"]
    data = collected(make(tmp_path / "model"), tmp_path / "set", **options)
    assert len(data) == 2 * 2 * 2
    assert data.conditional is not None
    assert data.conditional.tolist() == [True, True, False, False] * 2
    given = data.inputs(range(8))
    samples, prompts = given["hidden_states"], given["encoder_hidden_states"]
    assert torch.equal(samples[:2], samples[2:4])
    assert not torch.equal(prompts[:2], prompts[2:4])
    assert torch.equal(prompts[2], prompts[3])  # the empty prompt


def test_constants_travel_with_the_set(tmp_path: Path) -> None:
    make, options = FIELD["integers"]
    data = collected(make(tmp_path / "model"), tmp_path / "set", **options)
    assert data.form is not None
    assert data.form.arguments["num_frames"] == {"value": 41}  # latents of 161 frames
    assert not any(name.startswith("num_frames") for name in data.inputs([0]))


def test_what_has_no_rows_is_kept_once_and_given_to_all(tmp_path: Path) -> None:
    make, options = FIELD["a tuple of tensors"]
    data = collected(make(tmp_path / "model"), tmp_path / "set", **options)
    assert data.form is not None
    assert data.form.shared == {"image_rotary_emb.0": 2, "image_rotary_emb.1": 2}
    assert data.inputs([0, 1, 2])["image_rotary_emb.0"].ndim == 2
    assert data.probe_inputs([0, 1, 2])["image_rotary_emb.0"].shape[0] == 3


# -- what cannot be recorded ------------------------------------------------------------------------------


class Loop:
    """As much of a pipeline as a survey asks for: a scheduler, and a loop."""

    def __init__(self, folder: Path, call: Callable[[nn.Module, Tensor, Tensor, int], Any]) -> None:
        stock = open_model(folder).pipeline()
        self.scheduler, self.unet, self.call = stock.scheduler, stock.unet, call

    def __call__(self, images: range) -> None:
        self.scheduler.set_timesteps(3)
        x = torch.ones(len(images), 3, 8, 8)
        for number, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(self.call(self.unet, x, t, number), t, x).prev_sample


def looked_at(folder: Path, call: Callable[..., Any]) -> Any:
    loop = Loop(folder, call)
    return survey(loop, loop.unet, loop)


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    return ddpm_folder(tmp_path / "ddpm")


def test_several_calls_a_step_are_counted(ddpm: Path) -> None:
    def twice(unet: nn.Module, x: Tensor, t: Tensor, number: int) -> Tensor:
        return unet(x, t).sample + unet(x * 0.5, t).sample

    found = looked_at(ddpm, twice)
    assert (found.steps, found.branches) == (3, 2)


def test_a_solver_that_looks_ahead_in_time_has_a_branch_for_it(ddpm: Path) -> None:
    def heun(unet: nn.Module, x: Tensor, t: Tensor, number: int) -> Tensor:
        return (unet(x, t).sample + unet(x, t * 0.5).sample) / 2

    assert looked_at(ddpm, heun).branches == 2


def test_guidance_that_stops_half_way_is_refused(ddpm: Path) -> None:
    def interval(unet: nn.Module, x: Tensor, t: Tensor, number: int) -> Tensor:
        return unet(x, t).sample + (unet(x, t).sample if number < 2 else 0)

    with pytest.raises(InvalidInputError, match="1 or 2 times a step"):
        looked_at(ddpm, interval)


def test_an_object_of_the_pipeline_among_the_arguments_is_refused_by_name(ddpm: Path) -> None:
    def odd(unet: nn.Module, x: Tensor, t: Tensor, number: int) -> Tensor:
        return unet(x, t, class_labels=object()).sample

    with pytest.raises(InvalidInputError, match="class_labels as a object, which no graph can take"):
        looked_at(ddpm, odd)


def test_a_constant_that_changes_from_step_to_step_is_refused_by_name(tmp_path: Path) -> None:
    model = open_model(ddpm_folder(tmp_path / "ddpm"))

    def scaled(unet: Any, x: Tensor, t: Tensor, number: int) -> Tensor:
        return unet(x, t, strength=1.0 + number)

    loop = Loop(model.path, scaled)
    stock = loop.unet.forward

    def forward(self: Any, sample: Tensor, timestep: Tensor, strength: float = 0.0) -> Tensor:
        return stock(sample, timestep).sample * strength

    loop.unet.forward = types.MethodType(forward, loop.unet)
    with pytest.raises(InvalidInputError, match=r"strength=\d\.0 instead of strength=1.0"):
        survey(loop, loop.unet, loop)


def test_state_besides_the_arguments_is_found_by_repeating_the_call(tmp_path: Path) -> None:
    loop = Loop(ddpm_folder(tmp_path / "ddpm"), lambda unet, x, t, number: unet(x, t).sample)
    loop.unet.register_buffer("extra", torch.zeros(1), persistent=False)
    stock = loop.unet.forward

    def forward(self: Any, sample: Tensor, timestep: Tensor) -> Any:
        self.extra += 1
        return stock(sample + self.extra, timestep)

    loop.unet.forward = types.MethodType(forward, loop.unet)
    with pytest.raises(InvalidInputError, match="something besides the arguments"):
        survey(loop, loop.unet, loop)


def test_a_pipeline_that_never_calls_its_denoiser_is_refused(ddpm: Path) -> None:
    with pytest.raises(InvalidInputError, match="did not call the denoiser"):
        looked_at(ddpm, lambda unet, x, t, number: x * 0)


def test_full_precision_results_never_bear_another_networks_name(tmp_path: Path) -> None:
    pipeline = open_model(stable_diffusion_folder(tmp_path / "sd")).pipeline()
    given, own = pipeline.unet, open_model(tmp_path / "sd").load()
    given.forward = lambda *args, **kwargs: own(*args, **kwargs)
    given.__class__ = type("Ignored", (type(given),), {"__call__": lambda self, *a, **k: own(*a, **k)})
    with pytest.raises(InvalidInputError, match="did not call the unet"):
        generate(pipeline, [0], 2, prompts=["a cat"])


def test_attention_that_is_replaced_while_sampling_is_refused_and_put_back(tmp_path: Path) -> None:
    entry = ENTRIES["StableDiffusionPAGPipeline"]
    options = entry.write(tmp_path / "model")
    pipeline = open_model(tmp_path / "model").pipeline()
    before = dict(pipeline.unet.attn_processors)
    with pytest.raises(InvalidInputError, match="replaces the attention of its denoiser"):
        survey(
            pipeline,
            pipeline.unet,
            lambda images: generate(
                pipeline, list(images), 2, ["a"] * len(images), **dict(options["arguments"])
            ),
        )
    assert dict(pipeline.unet.attn_processors) == before


def test_pipelines_that_keep_their_own_denoiser_are_given_ours(tmp_path: Path) -> None:
    model = open_model(wan_folder(tmp_path / "wan"))
    denoiser = model.load()
    assert model.pipeline(denoiser).transformer is denoiser


# -- the form of a call -----------------------------------------------------------------------------------


class Network(nn.Module):
    """Takes everything that a call can be made of."""

    def forward(
        self, x: Tensor, timestep: Tensor, extra: Any = None, scale: float = 1.0, return_dict: bool = True
    ) -> Tensor:
        return x


def form(**extra: Any) -> Any:
    return read_call(signature_of(Network()), (torch.zeros(2, 3), 5), extra)


def test_defaults_and_manners_are_no_part_of_the_form() -> None:
    plain = form()[0]
    assert form(extra=None, scale=1.0, return_dict=False)[0] == plain
    assert plain.plain
    assert plain.difference(form(scale=2.0)[0], 2) == "scale=2.0 instead of scale=its default"


@pytest.mark.parametrize(
    "extra",
    [
        (torch.ones(2, 1), 3, None),
        {"a": [torch.ones(2), "word"], "b": {"c": (True, 1.5)}},
        [torch.ones(2, 2, dtype=torch.complex64)],
        [],
        {},
    ],
    ids=["tuple", "nested", "complex", "empty list", "empty dictionary"],
)
def test_a_call_is_built_again_as_it_was(extra: Any) -> None:
    found, tensors = form(extra=extra)
    again = type(found).of(found.to_facts()).build(tensors, 2)

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, list | tuple):
            return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
        return bool(one == other)

    assert same(extra, again["extra"])


@pytest.mark.parametrize("one", [3, 3.0, True, "3", None, (3,), [3], {"a": 3}])
@pytest.mark.parametrize("other", [3, 3.0, True, "3", None, (3,), [3], {"a": 3}])
def test_forms_are_equal_where_their_constants_are(one: Any, other: Any) -> None:
    differs = form(extra=one)[0].difference(form(extra=other)[0], 2) is not None
    numbers = {type(one), type(other)} == {int, float}  # 3 and 3.0 are one number
    assert differs == (type(one) is not type(other) and not numbers)
