"""Mean errors taken out of predictions: right where there is one, nothing where there is none."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdeploy.calibration_set.collect import collect
from qdeploy.cli import main
from qdeploy.evaluate.check import check
from qdeploy.evaluate.quality import QualityPlan, Trajectories, measure_quality
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import CHECKING
from qdeploy.sampling.correct import correct, read_choice
from qdeploy.sampling.correction import Corrected, OnlineCorrection, TableCorrection
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.store.correction_table import CorrectionTable, read_correction
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import reseal

STEPS, SIZE = 50, 24
SHAPE = (3, SIZE, SIZE)
NUMEL = math.prod(SHAPE)
# The spread of d = e^ - e for a perfect network is sqrt(2 - 2 rho) < 1.2 on these schedules.
BOUND = 4 * 1.2 / math.sqrt(NUMEL)


class Oracle(nn.Module):
    """A perfect network for images that it knows, with a constant error on top."""

    def __init__(self, scheduler: Any, kind: str = "epsilon", bias: float = 0.0) -> None:
        super().__init__()
        self.alphas, self.kind, self.bias = scheduler.alphas_cumprod, kind, bias
        self.config = FrozenDict(in_channels=3, sample_size=SIZE)
        self.dtype, self.device = torch.float32, torch.device("cpu")  # type: ignore[assignment]
        self.images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1
        self.calls: list[int] = []

    def forward(
        self, sample: Tensor, timestep: Any, image: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        self.calls.append(len(sample))
        alpha = self.alphas[int(torch.as_tensor(timestep).flatten()[0])]
        clean = self.images[torch.arange(len(sample)) if image is None else image]
        noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt() + self.bias
        if self.kind == "v_prediction":
            noise = (noise - (1 - alpha).sqrt() * sample) / alpha.sqrt()
        return SimpleNamespace(sample=noise) if return_dict else (noise,)


def schedule(name: str = "DDIMScheduler", kind: str = "epsilon", steps: int = STEPS) -> Any:
    scheduler = getattr(diffusers, name)(prediction_type=kind)
    scheduler.set_timesteps(steps)
    return scheduler


def noise(*seeds: int) -> Tensor:
    return torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def run(denoiser: Any, scheduler: Any, x: Tensor, steps: int = STEPS, **inputs: Tensor) -> Tensor:
    """A plain sampling loop."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(
                denoiser(scheduler.scale_model_input(x, t), t, **inputs).sample, t, x
            ).prev_sample
    return x


SAMPLERS = ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]


# -- the estimator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("step", [6, 16, 26, 36, 46])
def test_a_perfect_network_is_estimated_as_perfect(kind: str, step: int) -> None:
    """P23: without the guard |mu| stays below 4 sqrt(2 - 2 rho) / sqrt(n)."""
    scheduler = schedule(kind=kind)
    estimator = OnlineCorrection(scheduler, every=1, guard=0.0)
    denoiser = Oracle(scheduler, kind)
    now, following = (float(scheduler.alphas_cumprod[scheduler.timesteps[i]]) for i in (step, step + 1))
    x = math.sqrt(now) * denoiser.images + math.sqrt(1 - now) * noise(1, 2, 3, 4)
    with torch.no_grad():
        Corrected(denoiser, estimator)(x, scheduler.timesteps[step])
    assert estimator._mu is not None
    rho = math.sqrt((1 - now / following) / (1 - now))
    assert float(estimator._mu.abs().max()) < 4 * math.sqrt(2 - 2 * rho) / math.sqrt(NUMEL)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_images_of_a_perfect_network_stay_as_they_are(kind: str) -> None:
    """P23: what could be chance is no error, so nothing changes at all."""
    scheduler = schedule(kind=kind)
    plain = run(Oracle(scheduler, kind), scheduler, noise(1, 2))
    correction = OnlineCorrection(scheduler)
    assert torch.equal(run(Corrected(Oracle(scheduler, kind), correction), scheduler, noise(1, 2)), plain)
    assert correction.calls == 5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("bias", [0.3, -0.2])
def test_a_constant_error_is_estimated(kind: str, bias: float) -> None:
    """P23, at one call: of an error c the estimate keeps at least sqrt(1 - rho^2) and at most all."""
    scheduler = schedule(kind=kind)
    correction = OnlineCorrection(scheduler, every=1)
    denoiser = Oracle(scheduler, kind, bias)
    t = int(scheduler.timesteps[20])
    alpha = float(scheduler.alphas_cumprod[t])
    x = math.sqrt(alpha) * denoiser.images[:2] + math.sqrt(1 - alpha) * noise(1, 2)
    with torch.no_grad():
        given = denoiser(x, t).sample
        better = Corrected(denoiser, correction)(x, t).sample
    assert correction._mu is not None
    following = float(scheduler.alphas_cumprod[int(scheduler.timesteps[21])])
    kept = math.sqrt((1 - following) * alpha / following / (1 - alpha))
    assert (correction._mu - kept * bias).abs().max() < BOUND
    scale = math.sqrt(alpha) if kind == "v_prediction" else 1
    torch.testing.assert_close(given - better, correction._mu.view(2, 1, 1, 1).expand_as(x) / scale)


class Bright(Oracle):
    """Perfect for all but an image's brightness, which it takes as it finds it: its noise has mean 0."""

    def forward(self, sample: Tensor, timestep: Any, image: Any = None, return_dict: bool = True) -> Any:
        noise = super().forward(sample, timestep, image).sample - self.bias
        noise = noise - noise.mean((1, 2, 3), keepdim=True) + self.bias
        return SimpleNamespace(sample=noise) if return_dict else (noise,)


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_the_first_estimate_on_the_error_is_gone(name: str) -> None:
    """With each kind of sampler: the correction is in the prediction and not in the step."""
    scheduler = schedule(name)
    perfect = Bright(scheduler)
    corrected = Corrected(Bright(scheduler, bias=0.25), OnlineCorrection(scheduler))
    errors: list[float] = []

    def both(x: Tensor, t: Tensor) -> Any:
        output = corrected(x, t)
        errors.append(float((output.sample - perfect(x, t).sample).mean()))
        return output

    run(both, scheduler, noise(1, 2) * scheduler.init_noise_sigma)
    assert errors[:6] == pytest.approx([0.25] * 6, abs=1e-3)
    assert errors[6:] == pytest.approx([0.0] * len(errors[6:]), abs=1e-3)


@pytest.mark.parametrize("every", [1, 4, 10, 60])
def test_extra_calls_are_those_of_the_interval(every: int) -> None:
    """P24: 50 steps and an interval of 10 take 5 extra calls."""
    scheduler = schedule()
    denoiser = Oracle(scheduler)
    correction = OnlineCorrection(scheduler, every=every)
    run(Corrected(denoiser, correction), scheduler, noise(1))
    expected = sum((i - 1) % every == every // 2 for i in range(STEPS))
    assert correction.calls == len(denoiser.calls) - STEPS == expected
    assert every != 10 or expected == 5


@pytest.mark.parametrize("steps", [STEPS, 1])
def test_nothing_is_kept_from_one_image_to_the_next(steps: int) -> None:
    """QNCD-4: the code corrects the first steps of an image by the error of the one before."""
    scheduler = schedule()
    corrected = Corrected(
        Oracle(scheduler, bias=0.3), OnlineCorrection(scheduler, every=1 if steps == 1 else 10)
    )
    first = run(corrected, scheduler, noise(1), steps)
    run(corrected, scheduler, noise(7), steps)
    assert torch.equal(run(corrected, scheduler, noise(1), steps), first)
    correction: Any = corrected.correction
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps[0]
    fresh = OnlineCorrection(scheduler)
    with torch.no_grad():
        correction.every = 10
        assert torch.equal(
            corrected(noise(1), t).sample, Corrected(corrected.denoiser, fresh)(noise(1), t).sample
        )


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    """QNCD-4: the code takes one mean over the batch."""
    scheduler = schedule()

    def sampled(seeds: tuple[int, ...], images: list[int]) -> Tensor:
        denoiser = Corrected(Oracle(scheduler, bias=0.3), OnlineCorrection(scheduler, guard=0.5))
        return run(denoiser, scheduler, noise(*seeds), image=torch.tensor(images))

    together = sampled((1, 2), [0, 1])
    alone = torch.cat([sampled((1,), [0]), sampled((2,), [1])])
    torch.testing.assert_close(together, alone)


def test_torch_s_own_generator_is_left_alone() -> None:
    """QNCD-4: the code draws from it, and so changes what a seed gives."""
    scheduler = schedule()
    before = torch.get_rng_state()
    run(Corrected(Oracle(scheduler), OnlineCorrection(scheduler, every=2)), scheduler, noise(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_both_halves_under_guidance_get_one_correction() -> None:
    """Else a large scale would multiply the difference of two estimates."""
    scheduler = schedule()
    correction = OnlineCorrection(scheduler, every=1, guard=0.0)
    denoiser = Oracle(scheduler, bias=0.3)
    x = noise(1, 2)
    t = scheduler.timesteps[10]
    doubled, images = torch.cat([x, x]), torch.tensor([2, 3, 0, 1])
    with torch.no_grad():
        plain = denoiser(doubled, t, images).sample
        corrected = Corrected(denoiser, correction)(doubled, t, image=images).sample
    mu = (plain - corrected).flatten(1).mean(1)
    assert torch.allclose(mu[:2], mu[2:], atol=1e-6)
    assert not torch.allclose(mu[0], mu[1], atol=1e-6)
    for guidance in (1.0, 7.5):
        guided, better = (
            uncond + guidance * (cond - uncond) for uncond, cond in (plain.chunk(2), corrected.chunk(2))
        )
        torch.testing.assert_close((guided - better).flatten(1).mean(1), mu[:2], rtol=0, atol=1e-4)


def test_every_call_of_a_step_is_corrected() -> None:
    """QNCD-5: the code leaves the second evaluation of the first step of PLMS as it is."""
    scheduler = schedule("PNDMScheduler", steps=10)
    table = CorrectionTable(torch.tensor([0.0, 999.0]), torch.tensor([[0.25] * 3, [0.25] * 3]), "epsilon")
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    right = run(Oracle(scheduler), scheduler, noise(1), 10)
    better = run(Corrected(Oracle(scheduler, bias=0.25), TableCorrection(table)), scheduler, noise(1), 10)
    torch.testing.assert_close(better, right, rtol=0, atol=1e-4)


def test_what_is_beside_the_noise_stays() -> None:
    """Channels of a learned variance behind the prediction, and of a mask behind the sample."""
    scheduler = schedule()
    correction = OnlineCorrection(scheduler, every=1, guard=0.0)
    t = scheduler.timesteps[10]
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.cat([x[:, :3] + 1, 7 * torch.ones_like(x[:, :3])], 1)

    x = torch.cat([noise(1, 2), 5 * torch.ones(2, 1, SIZE, SIZE)], 1)
    with torch.no_grad():
        output = predict(x)[:, :6]
        result = correction(predict, x, torch.tensor([float(t)]), output[:, :3])
        assert torch.equal(seen[1][:, 3:], x[:, 3:])
        learned = OnlineCorrection(scheduler, every=1, guard=0.0)
        result = learned(predict, x[:, :3], torch.tensor([float(t)]), output)
    assert torch.equal(result[:, 3:], output[:, 3:])
    assert not torch.equal(result[:, :3], output[:, :3])


# -- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_table_takes_out_the_error_that_it_holds(kind: str) -> None:
    scheduler = schedule(kind=kind)
    means = torch.linspace(-0.3, 0.5, 60).view(20, 3)
    table = CorrectionTable(torch.linspace(0, 999, 20), means, kind)
    denoiser = Oracle(scheduler, kind)
    x, t = noise(1, 2), 431
    with torch.no_grad():
        result = Corrected(denoiser, TableCorrection(table))(x, t, return_dict=False)[0]
        difference = denoiser(x, t).sample - result
    torch.testing.assert_close(difference, means[8].view(1, 3, 1, 1).expand_as(x), rtol=0, atol=1e-5)


def test_a_table_of_nothing_changes_nothing() -> None:
    scheduler = schedule()
    table = CorrectionTable(torch.tensor([5.0]), torch.zeros(1, 3), "epsilon")
    plain = run(Oracle(scheduler), scheduler, noise(1))
    assert torch.equal(run(Corrected(Oracle(scheduler), TableCorrection(table)), scheduler, noise(1)), plain)


def test_rows_of_several_timesteps_are_corrected_each_by_its_own() -> None:
    table = CorrectionTable(torch.tensor([1.0, 9.0]), torch.tensor([[1.0], [2.0]]), "epsilon")
    output = torch.zeros(3, 1, 2, 2)
    found = TableCorrection(table)(lambda x: x, output, torch.tensor([9.0, 1.0, 8.0]), output)
    assert found[:, 0, 0, 0].tolist() == [-2, -1, -2]
    tokens = TableCorrection(table)(lambda x: x, output, torch.tensor([1.0]), torch.zeros(2, 4, 1))
    assert tokens.flatten().tolist() == [-1] * 8


def test_a_table_of_other_channels_is_refused() -> None:
    table = CorrectionTable(torch.tensor([1.0]), torch.zeros(1, 4), "epsilon")
    with pytest.raises(InvalidInputError, match="4 channels"):
        TableCorrection(table)(lambda x: x, noise(1), torch.tensor([1.0]), noise(1))


# -- schedulers that it is not for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(prediction_type="sample"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
    ],
)
def test_other_predictions_are_refused_online(scheduler: Any) -> None:
    with pytest.raises(InvalidInputError, match="choose --correction none"):
        OnlineCorrection(scheduler)


def test_impossible_numbers_are_refused() -> None:
    for wrong in ({"every": 0}, {"guard": -1.0}, {"guard": float("nan")}):
        with pytest.raises(UsageError):
            OnlineCorrection(schedule(), **wrong)  # type: ignore[arg-type]


# -- in a stock pipeline, from an artifact -----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("correction")
    data = collect(ddpm, folder / "set", samples=8, keep=4, steps=5, scheduler="ddim")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "method: minmax\nweights: int4\nstages: [weight-ranges, activation-ranges, measure-errors]\n"
    )
    made = calibrate(ddpm, folder / "checkpoint", recipe=recipe, calibration=data)
    assert isinstance(made, Artifact)
    return made


FEW: dict[str, Any] = {"samples": 3, "steps": 8, "batch": 2, "scheduler": "ddim"}


def images_of(artifact: Artifact) -> Tensor:
    return load_file(artifact.file("images.safetensors"))["images"].int()


def test_sampling_with_a_correction_says_so(checkpoint: Artifact, tmp_path: Path) -> None:
    made = {
        name: sample(checkpoint, tmp_path / name, correction=name, **FEW)
        for name in ("none", "table", "online")
    }
    assert made["none"].facts.correction is None
    assert made["table"].facts.correction == "table"
    assert len({artifact.sha256 for artifact in made.values()}) == 3
    assert not torch.equal(images_of(made["none"]), images_of(made["table"]))
    apart = {}
    for name in ("none", "online"):
        again = sample(checkpoint, tmp_path / f"{name}-again", correction=name, **{**FEW, "batch": 3})
        apart[name] = (images_of(made[name]) - images_of(again)).abs().amax((1, 2, 3))
    # Kernels for another batch size may flip a rounding of the network; the correction adds no more than a level.
    assert torch.all(apart["online"] <= apart["none"].clamp(min=1))


def test_the_correction_counts_in_what_is_measured(checkpoint: Artifact, ddpm: Path) -> None:
    """The way to a mean error that is known: the table of the network, moved by it."""
    plan = QualityPlan(replace(CHECKING, steps=6, batch=2), samples=2, keep=3)
    trajectories = Trajectories(open_model(ddpm), plan)
    denoiser = open_model(ddpm).load()
    denoiser.conv_out.bias.add_(0.5)
    plain = measure_quality(trajectories, denoiser)
    table = CorrectionTable(torch.tensor([0.0]), torch.full((1, 3), 0.5), "epsilon")
    better = measure_quality(trajectories, Corrected(denoiser, TableCorrection(table)))
    assert better["sqnr_db"]["worst"] > plain["sqnr_db"]["worst"] + 40
    assert better["psnr_db"] > plain["psnr_db"] + 20


def test_guidance_prompts_and_other_arguments_reach_the_network(stable_diffusion: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": ["a cat", "two dogs"],
        "num_inference_steps": 12,
        "output_type": "np",
    }

    def made() -> Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return torch.as_tensor(pipeline(guidance_scale=4.0, generator=generator, **arguments).images)

    plain = made()
    unet = pipeline.unet
    pipeline.unet = Corrected(unet, OnlineCorrection(pipeline.scheduler, guard=1e6))
    assert torch.equal(made(), plain)
    assert pipeline.unet.config.in_channels == unet.config.in_channels
    assert pipeline.unet.conv_in is unet.conv_in
    assert pipeline.unet.correction.calls == 1
    pipeline.unet = Corrected(unet, OnlineCorrection(pipeline.scheduler, guard=0.0))
    assert torch.equal(made(), made())


def refused(result: Result, code: int, *words: str) -> None:
    message = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message, message


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        options = ("-o", tmp_path / "samples", "-n", 1, "--steps", 2)
        return CliRunner().invoke(main, ["sample", *map(str, (*arguments, *options))])

    return call


def test_a_table_that_is_not_there_is_a_usage_error(
    ddpm_engine: Artifact, ddpm: Path, command: Callable[..., Result], tmp_path: Path
) -> None:
    refused(command(ddpm_engine.path, "--correction", "table"), 2, "no correction table", "measure-errors")
    refused(command(ddpm, "--correction", "table"), 2, "full precision")
    refused(command(ddpm, "--correction", "magic"), 2, "magic")
    assert not list(tmp_path.iterdir())


def foreign(
    checkpoint: Artifact, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    """A copy of a checkpoint with another table, all of whose hashes are in order but the table's own."""
    shutil.copytree(checkpoint.path, folder)
    file = folder / "unet" / "correction.safetensors"
    save_file(change(load_file(file)), file)
    reseal(folder)
    return folder


def test_the_table_of_another_checkpoint_is_refused(
    checkpoint: Artifact, command: Callable[..., Result], tmp_path: Path
) -> None:
    other = foreign(checkpoint, tmp_path / "other", lambda table: {**table, "epsilon": table["epsilon"] + 1})
    refused(command(other, "--correction", "table"), 5, "another checkpoint")
    assert not (tmp_path / "samples").exists()


def test_another_type_of_prediction_is_refused(checkpoint: Artifact) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(
        InvalidInputError, match="type epsilon, and DDIMScheduler takes them for v_prediction"
    ) as error:
        correct(nn.Identity(), "table", checkpoint, scheduler)
    assert error.value.exit_code == 5
    assert read_correction(checkpoint).prediction == "epsilon"


def test_a_table_for_another_type_of_scheduler_is_refused(
    checkpoint: Artifact, command: Callable[..., Result], tmp_path: Path
) -> None:
    flow = "FlowMatchEulerDiscreteScheduler"
    result = command(checkpoint.path, "--correction", "table", "--scheduler", flow)
    refused(result, 5, "predictions of type epsilon", f"{flow} takes them for flow", "--correction none")
    assert not (tmp_path / "samples").exists()


def test_a_check_without_images_takes_no_correction(checkpoint: Artifact) -> None:
    result = CliRunner().invoke(main, ["check", str(checkpoint.path), "--correction", "table"])
    refused(result, 2, "--reference")


@pytest.mark.parametrize("name", ["table", "online"])
def test_a_check_measures_the_quality_with_the_correction(
    checkpoint: Artifact, ddpm: Path, name: str
) -> None:
    few: dict[str, Any] = {"samples": 2, "keep": 2, "steps": 8}
    plain = check(checkpoint, reference=ddpm, **few)
    result = check(checkpoint, reference=ddpm, correction=name, **few)
    assert (plain.quality["correction"], result.quality["correction"]) == ("none", name)
    assert result.parity == plain.parity
    # Nothing of this network's error is beyond chance within one image: the guard holds.
    assert (result.quality["psnr_db"] != plain.quality["psnr_db"]) == (name == "table")


def test_interval_and_guard_are_read_from_the_correction() -> None:
    choice = read_choice("online:4,2.5")
    assert (choice.kind, choice.every, choice.guard) == ("online", 4, 2.5)
    assert read_choice("online:4").guard == read_choice("online").guard == 3.0
    scheduler = diffusers.DDIMScheduler()
    made: Any = correct(nn.Identity(), "none", None, scheduler)
    assert isinstance(made, nn.Identity)


@pytest.mark.parametrize(
    "name", ["online:", "online:0", "online:x", "online:4,-1", "online:4,nan", "table:4", "on"]
)
def test_other_corrections_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="correction"):
        read_choice(name)
