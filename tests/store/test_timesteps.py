"""Whatever sampler with however many steps: every call uses the entry nearest to the timestep it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibration_set.collect import collect
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import example_inputs
from qdeploy.model.pipeline import generate
from qdeploy.model.schedulers import make_scheduler
from qdeploy.network.current_timestep import CurrentTimestep, midpoints
from qdeploy.network.roles import find_structure
from qdeploy.quant.insert import quantize_structure
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.store.facts import TimestepFacts, TimeTableFacts
from qdeploy.store.timesteps import check_timestep, explain_schedule
from qdeploy.system.errors import InvalidInputError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import some_facts
from tests.models import ddpm_folder, stable_diffusion_folder

CALIBRATED = torch.arange(20) * 50.0 + 1  # those of 20 steps, as Stable Diffusion's samplers take them
STEPS = (1, 4, 20, 25, 30, 50, 100, 200, 400, 1000)


def nearest(timestep: float, calibrated: Tensor = CALIBRATED) -> int:
    """The documented entry, written down a second time: the nearest, of two the lower."""
    gaps = [abs(float(known) - timestep) for known in calibrated]
    return gaps.index(min(gaps))


def banked(denoiser: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """A quantized network with a scale for each of the calibrated timesteps."""
    structure = find_structure(denoiser, inputs)
    quantize_structure(denoiser, structure, resolve_recipe(method="minmax"))
    for layer in quantized_layers(denoiser).values():
        for quantizer in layer.activation_quantizers:
            scales = torch.linspace(0.02, 0.05, len(CALIBRATED))
            quantizer.set(scales, torch.zeros(len(CALIBRATED)), midpoints(CALIBRATED))
    return denoiser.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddpm_folder(tmp_path_factory.mktemp("small") / "ddpm", channels=(4, 4), dropout=0.0)


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_folder(tmp_path_factory.mktemp("small") / "sd")


@pytest.fixture(scope="module")
def unconditional(small: Path) -> nn.Module:
    model = open_model(small)
    return banked(model.load(), example_inputs(model, 1))


@pytest.fixture(scope="module")
def text(small_sd: Path) -> nn.Module:
    model = open_model(small_sd)
    return banked(model.load(), example_inputs(model, 1))


@contextmanager
def watched(denoiser: nn.Module) -> Iterator[list[tuple[float, set[int]]]]:
    """For every call of the denoiser: the timestep it is passed, and the entries that its quantizers use."""
    calls: list[tuple[float, set[int]]] = []
    stock = CurrentTimestep.index

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append((float(torch.as_tensor(given).flatten()[0]), set()))

    def spy(self: CurrentTimestep, edges: Tensor, *known: Any) -> Tensor:
        found = stock(self, edges, *known)
        calls[-1][1].update(found.tolist())
        return found

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurrentTimestep, "index", spy)
        yield calls
    handle.remove()


def run(folder: Path, denoiser: nn.Module, scheduler: str, steps: int) -> list[tuple[float, set[int]]]:
    """The calls that an unmodified pipeline makes."""
    pipeline = open_model(folder).pipeline(denoiser)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    if scheduler == "euler":
        pipeline.scheduler.register_to_config(timestep_spacing="linspace")  # fractional timesteps
    prompts = ["a cat"] if hasattr(pipeline, "text_encoder") else None
    with watched(denoiser) as calls:
        generate(pipeline, [0], steps, prompts)
    return calls


# -- through pipelines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("ddim", 20), ("ddim", 50), ("ddim", 100), ("ddim", 30), ("pndm", 20), ("dpm++", 25)],
)
def test_every_call_uses_the_entry_of_the_timestep_it_is_passed(
    small: Path, unconditional: nn.Module, scheduler: str, steps: int
) -> None:
    """P9. QUEST-1: sets were reselected every ``i % 10`` calls, whatever the steps."""
    calls = run(small, unconditional, scheduler, steps)
    assert len(calls) >= steps
    for timestep, used in calls:
        assert used == {nearest(timestep)}, timestep
    assert len({timestep for timestep, _ in calls}) >= steps


@pytest.mark.parametrize(("scheduler", "steps"), [("euler", 7), ("dpm++", 10), ("ddim", 30)])
def test_every_call_of_a_text_to_image_pipeline_too(
    small_sd: Path, text: nn.Module, scheduler: str, steps: int
) -> None:
    """Both halves of classifier-free guidance; Euler's timesteps are fractional."""
    calls = run(small_sd, text, scheduler, steps)
    assert len(calls) == steps
    for timestep, used in calls:
        assert used == {nearest(timestep)}, timestep
    assert scheduler != "euler" or any(timestep != round(timestep) for timestep, _ in calls)


def test_plms_calls_once_more_than_it_has_steps_and_never_with_another_calls_scales(
    small_sd: Path, text: nn.Module
) -> None:
    """Trap of DGQ (15): PLMS repeats its second timestep, so a counter of calls is one behind ever after."""
    steps = 10
    calls = run(small_sd, text, "pndm", steps)
    timesteps = [timestep for timestep, _ in calls]
    assert len(calls) == steps + 1
    assert len(set(timesteps)) == steps
    assert timesteps[1] == timesteps[2]
    assert calls[1][1] == calls[2][1]
    assert [used for _, used in calls] == [{nearest(timestep)} for timestep in timesteps]
    by_counter = [nearest(sorted(set(timesteps), reverse=True)[min(i, steps - 1)]) for i in range(len(calls))]
    assert [{entry} for entry in by_counter] != [used for _, used in calls]  # the trap, put back


def test_a_schedule_that_was_calibrated_uses_every_entry_once(small_sd: Path, text: nn.Module) -> None:
    """P9: the number of distinct sets in use is that of the calibrated steps."""
    calls = run(small_sd, text, "ddim", 20)
    assert sorted(entry for _, used in calls for entry in used) == list(range(20))


# -- any number of steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm++", "euler"])
def test_every_timestep_of_every_schedule_has_an_entry(small_sd: Path, scheduler: str, steps: int) -> None:
    """P9: the lookup is total, and nearest, for all samplers and steps."""
    chosen = make_scheduler(scheduler, open_model(small_sd).scheduler())
    try:
        chosen.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        pytest.skip(f"diffusers has no such schedule: {error}")
    timesteps = torch.as_tensor(chosen.timesteps).float()
    assert len(timesteps) == steps + (scheduler == "pndm" and steps > 1)
    current = CurrentTimestep()
    with current.at(timesteps):
        found = current.index(midpoints(CALIBRATED)).tolist()
    assert found == [nearest(timestep) for timestep in timesteps.tolist()]


def ldm_schedule(steps: int) -> list[int]:
    """The timesteps of the sampler of LDM and Stable Diffusion's first code, noisiest first."""
    return [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]


@pytest.mark.parametrize("steps", STEPS)
def test_the_reference_formula_misses_entries_where_steps_do_not_divide_1000(steps: int) -> None:
    """TFMQ-1: ``(S - 1) - (t - 1) // (1000 // S)`` leaves the table for S = 30 and 400; the lookup does not."""
    schedule = ldm_schedule(steps)
    formula = [(steps - 1) - (t - 1) // (1000 // steps) for t in schedule]
    in_table = all(0 <= entry < steps for entry in formula)
    assert in_table == (steps not in (30, 400))
    assert len(schedule) == {30: 31, 400: 500}.get(steps, steps)
    calibrated = torch.tensor(sorted(schedule), dtype=torch.float32)
    current = CurrentTimestep()
    with current.at(torch.tensor(schedule)):
        mine = current.index(midpoints(calibrated))
    assert calibrated[mine].tolist() == schedule
    if in_table:
        assert [len(schedule) - 1 - int(entry) for entry in mine] == formula


# -- what is said of it ------------------------------------------------------------------------------------


def limits(*calibrated: float) -> TimestepFacts:
    return TimestepFacts(low=0.0, high=999.0, calibrated=list(calibrated))


def facts(*calibrated: float, scales: bool = True) -> Any:
    return some_facts(timesteps=limits(*calibrated), timestep_scales=scales)


def test_a_schedule_is_explained_in_one_sentence() -> None:
    assert explain_schedule(facts(1, 501), [501, 1]) == "2 of 2 timesteps were calibrated exactly"
    assert explain_schedule(facts(1, 501), [501, 501, 400, 0]) == (
        "1 of 3 timesteps were calibrated exactly, the others take the group of the nearest; "
        "the furthest is 400, 101 away"
    )
    assert explain_schedule(facts(1, 501), [0.5, 1.0]) == (
        "1 of 2 timesteps were calibrated exactly, the others take the group of the nearest; "
        "the furthest is 0.5, 0.5 away"
    )


def test_nothing_is_said_where_scales_do_not_depend_on_the_timestep() -> None:
    assert explain_schedule(facts(1, 501, scales=False), [7]) is None
    assert explain_schedule(some_facts(), [7]) is None


def test_timesteps_outside_of_training_are_refused() -> None:
    for timestep in (0, 0.5, 999, 999.0005):
        check_timestep(limits(1), None, timestep, "it")
    for timestep in (-1, -0.01, 999.01, 1000):
        with pytest.raises(InvalidInputError, match=r"it was calibrated for timesteps from 0 to 999, not"):
            check_timestep(limits(1), None, timestep, "it")
    check_timestep(None, None, 1e9, "an artifact that says nothing")


def test_a_table_of_one_schedule_has_no_other_rows() -> None:
    table = TimeTableFacts(storage="fp32", schedule="ddim:2", rows=[0, 500.5], bytes=8)
    check_timestep(limits(1), table, 500.5, "it")
    check_timestep(limits(1), TimeTableFacts(storage="fp32", schedule=None, rows=None, bytes=8), 77, "it")
    with pytest.raises(
        InvalidInputError, match=r"ddim:2 and has no row for timestep 500: .*--table-rows SCHEDULER"
    ):
        check_timestep(limits(1), table, 500, "it")


def test_sampling_says_how_the_schedule_meets_the_scales(
    ddpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(ddpm, tmp_path / "set", samples=4, keep=2, steps=4, scheduler="ddim")
    checkpoint = calibrate(
        ddpm, tmp_path / "checkpoint", calibration=tmp_path / "set", method="minmax", timestep_groups=2
    )
    assert isinstance(checkpoint, Artifact)
    calibrated = checkpoint.facts.timesteps.calibrated
    assert len(calibrated) == 2
    assert checkpoint.facts.timestep_scales
    capsys.readouterr()
    sample(checkpoint, tmp_path / "samples", samples=1, steps=4, scheduler="ddim")
    told = capsys.readouterr().err
    furthest = max([0.0, 250.0, 500.0, 750.0], key=lambda t: min(abs(t - known) for known in calibrated))
    assert "2 of 4 timesteps were calibrated exactly" in told
    assert f"the furthest is {furthest:g}" in told


def test_quantizers_that_are_shared_ask_for_the_same_entry(unconditional: nn.Module) -> None:
    """The spy above sees every quantizer: none of them keeps an entry of an earlier call."""
    quantizers = [m for m in unconditional.modules() if isinstance(m, ActivationQuantizer)]
    assert len({id(quantizer.current_timestep) for quantizer in quantizers}) == 1
    with watched(unconditional) as calls:
        for timestep in (1, 951, 1):
            unconditional(torch.zeros(1, 3, 8, 8), timestep)
    assert [used for _, used in calls] == [{0}, {19}, {0}]
