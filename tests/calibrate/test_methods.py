"""Methods on a real network: units in order, what is better is kept, the same codes every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate import rounding
from qdeploy.calibrate.methods import minmax, qdiffusion
from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.model.inputs import denoise
from qdeploy.network.roles import find_structure
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import full_precision
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.quant.state import quantizers, read_state
from qdeploy.recipe.coverage import COVERAGES, covered, find_coverage
from qdeploy.recipe.effort import EFFORTS, Effort
from qdeploy.recipe.formats import FORMATS, integer
from qdeploy.recipe.stages import check_stages, find_method, methods, stages
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, Stopped, calibrating, relative, same_state, tiny_unet

SHORT = Effort("short", rows=96, batch=16, rounding=60, scales=20)
DATA = MemoryRows.noisy(images=24)


def run(output: Path, effort: Effort | None = None, **recipe: Any) -> Session:
    """A finished calibration."""
    given = {} if effort is None else {"effort": effort}
    with calibrating(tiny_unet(), DATA, output, **given, **recipe) as session:
        run_stages(session)
    return session


def predictions(session: Session) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, full-precision and quantized predictions of held-out rows."""
    _, judge = session.split(range(len(session.data)))
    inputs = session.data.inputs(judge)
    with torch.no_grad():
        quantized = denoise(session.denoiser, inputs)
        with full_precision(session.denoiser):
            return inputs["timestep"], denoise(session.denoiser, inputs), quantized


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Q-Diffusion at W4A8, with a little more effort; the report holds each unit's error before and after."""
    stock: Any = qdiffusion.round_unit
    errors: list[tuple[float, float]] = []

    def spy(session: Session, problem: UnitProblem, *rest: Any, **options: Any) -> float:
        nearest = problem.judged(2)
        gain = float(stock(session, problem, *rest, **options))
        errors.append((nearest, problem.judged(2)))
        return gain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdiffusion, "round_unit", spy)
        folder = tmp_path_factory.mktemp("finished")
        session = run(folder / "out", SHORT, method="qdiffusion", weights="int4")
    session.report["errors"] = errors
    return session


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Q-Diffusion with next to no effort; the report holds the mode of every dropout met while learning."""
    stock = qdiffusion.optimize
    dropouts: list[bool] = []

    def spy(problem: UnitProblem, *args: Any, **kwargs: Any) -> None:
        stock(problem, *args, **kwargs)
        found = [
            module for module in problem.run.unit.modules() if isinstance(module, nn.Dropout) and module.p
        ]
        dropouts.extend(module.training for module in found)

    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdiffusion, "optimize", spy)
        folder = tmp_path_factory.mktemp("uninterrupted")
        session = run(folder / "out", method="qdiffusion", weights="int4", seed=3)
    session.report["dropouts"] = dropouts
    return session


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run(tmp_path_factory.mktemp("baseline") / "out", SHORT, method="minmax", weights="int4")


# -- the register ------------------------------------------------------------------------------------------


def test_every_method_is_made_of_known_stages_and_cites_its_paper() -> None:
    for method in methods().values():
        assert check_stages(method.stages) == tuple(method.stages)
        assert "arXiv" in method.paper
        assert method.description
    assert all(stage.description for stage in stages().values())


def test_unknown_methods_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="minmax, qdiffusion"):
        find_method("magic")


def test_what_a_stage_says_it_costs_is_what_it_runs(tmp_path: Path) -> None:
    """Passes over the rows, of the stages that run nothing else; a search for ranges counts as half a one."""
    rows = Counter[str]()
    with calibrating(tiny_unet(), DATA, tmp_path / "out", method="minmax") as session:
        session.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: rows.update({session.stage: len(kwargs["sample"])}),
            with_kwargs=True,
        )
        run_stages(session)
        for number, stage in enumerate(session.recipe.stages):
            passes, steps = stage.cost(len(session.units), session.effort)
            assert (rows[f"{number}-{stage.name}"] / session.effort.rows, 0) == (passes, steps)
    assert minmax.WeightRanges("lp").cost(1, SHORT) == (0.5, 0)


# -- all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", COVERAGES)
def test_switched_off_a_calibrated_network_is_bit_identical(tmp_path: Path, coverage: str) -> None:
    inputs = DATA.inputs(range(6))
    with torch.no_grad():
        before = denoise(tiny_unet(), inputs)
        session = run(tmp_path / "out", coverage=coverage)
        assert not torch.equal(denoise(session.denoiser, inputs), before)
        with full_precision(session.denoiser):
            assert torch.equal(denoise(session.denoiser, inputs), before)


def test_sixteen_bits_everywhere_are_as_good_as_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "int8", integer(16))
    with calibrating(tiny_unet(), DATA, tmp_path / "out", SHORT) as session:  # with all rows: none is clipped
        for layer in quantized_layers(session.denoiser).values():
            for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
                quantizer.set(*minmax.WEIGHT_FINDERS["minmax"](weight, quantizer.format))  # type: ignore[operator]
        for _, quantizer, summary in minmax.summarize(session):
            quantizer.set(*minmax.ACTIVATION_FINDERS["minmax"](summary, quantizer.format))
        _, reference, quantized = predictions(session)
    assert relative(reference, quantized) < 1e-3
    assert nn.functional.cosine_similarity(reference.flatten(), quantized.flatten(), dim=0) > 0.9999


# -- coverage ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_covered_layers_are_those_of_the_profile_and_no_others(finished: Session) -> None:
    structure = find_structure(tiny_unet(), DATA.inputs([0]))
    expected = {layer.path for layer in structure.layers if not (layer.temporal or layer.first or layer.last)}
    assert set(quantized_layers(finished.denoiser)) == {layer.path for layer in finished.layers} == expected
    everything = covered(structure, find_coverage("qdiffusion-paper"))
    assert everything == list(structure.layers)


def test_excluded_layers_stay_in_float(tmp_path: Path) -> None:
    with calibrating(
        tiny_unet(), DATA, tmp_path / "out", exclude=("mid_block.*", "*.conv_shortcut")
    ) as session:
        paths = list(quantized_layers(session.denoiser))
    assert paths
    assert not any(path.startswith("mid_block.") or path.endswith(".conv_shortcut") for path in paths)


def test_tied_layers_share_one_quantizer_and_split_ones_have_two(finished: Session) -> None:
    layers = quantized_layers(finished.denoiser)
    for path in finished.structure.attentions:
        query, key, value = (layers[f"{path}.to_{name}"].input_quantizers[0] for name in "qkv")
        assert query is key is value
    splits = {layer.path for layer in finished.layers if layer.split}
    assert splits == {path for path, layer in layers.items() if len(layer.input_quantizers) == 2}
    assert splits


# -- ranges ------------------------------------------------------------------------------------------------


def test_every_row_is_observed_once_with_float_activations(tmp_path: Path) -> None:
    """QD-10 for range finding; and the ranges are those of inputs from layers with quantized weights."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        minmax.WeightRanges().run(session)
        rows = session.rows()
        assert len(rows) % session.effort.batch
        found = minmax.summarize(session)
        for _, _, statistics in found:
            assert len(torch.cat(statistics.lows)) == len(rows)
        seen: list[Tensor] = []
        _, last, statistics = found[-1]
        handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad(), session.weights_only():
            denoise(session.denoiser, session.inputs(rows))
        handle.remove()
        assert torch.allclose(torch.cat(statistics.highs), seen[0].flatten(1).amax(1), atol=1e-4)
    assert not any(module._forward_pre_hooks for _, module, _ in found)


def test_minmax_ranges_cover_all_that_the_network_shows(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        minmax.WeightRanges().run(session)
        minmax.ActivationRanges().run(session)
        worst = []

        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            worst.append(float(args[0].abs().max() / (module.scale * 127)))  # type: ignore[operator]

        for _, quantizer in quantizers(session.denoiser):
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.register_forward_pre_hook(watch)
        with torch.no_grad(), session.weights_only():
            denoise(session.denoiser, session.inputs(session.rows()))
    assert max(worst) <= 1 + 1e-4
    assert min(worst) > 0.99  # each range is reached: none was found elsewhere


# -- the walk ----------------------------------------------------------------------------------------------


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Have a function called with session, problem and unit before each unit is rounded."""

    def install(look: Callable[..., None]) -> None:
        stock: Any = qdiffusion.round_unit

        def spy(
            session: Session, problem: UnitProblem, layers: Any, name: str, *rest: Any, **options: Any
        ) -> float:
            look(session, problem, name.removeprefix("round/"))
            return float(stock(session, problem, layers, name, *rest, **options))

        monkeypatch.setattr(qdiffusion, "round_unit", spy)

    return install


def test_units_are_rounded_in_execution_order_each_once(tmp_path: Path, rounded: Any) -> None:
    """QD-5: in another order a unit's inputs come from units that are not done."""
    visited: list[str] = []

    def look(session: Session, problem: UnitProblem, unit: str) -> None:
        visited.append(unit)
        done = {
            unit for unit, layers in session.units.items() if all(map(decided, session.quantized(layers)))
        }
        assert done == set(visited[:-1])
        with session.weights_only():
            assert_inputs_are_live(session, problem)

    rounded(look)
    session = run(tmp_path / "out", method="qdiffusion", weights="int4")
    assert visited == list(session.units)
    order = [min(layer.order for layer in layers) for layers in session.units.values()]
    assert order == sorted(order)


def assert_inputs_are_live(session: Session, problem: UnitProblem) -> None:
    """What a unit learns from is what the units before it give, as they are now."""
    seen: list[Any] = []
    handle = problem.run.unit.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rows = session.rows()[: session.effort.batch]
    with torch.no_grad():
        denoise(session.denoiser, session.inputs(rows))
    handle.remove()
    args, _ = problem.run.inputs.batch(torch.arange(len(rows)))
    assert torch.equal(args[0], seen[0])


def decided(layer: nn.Module) -> bool:
    quantizers: Any = layer.weight_quantizers
    return all(quantizer.codes is not None for quantizer in quantizers)


def test_dropout_is_off_throughout(uninterrupted: Session) -> None:
    """QD-2. The network has a dropout of 0.1: were it on, two runs of a unit would differ."""
    assert uninterrupted.report["dropouts"]
    assert not any(uninterrupted.report["dropouts"])
    assert not any(module.training for module in uninterrupted.denoiser.modules())


# -- the result --------------------------------------------------------------------------------------------


def test_no_unit_is_worse_than_rounded_to_nearest(finished: Session) -> None:
    errors = finished.report["errors"]
    assert len(errors) == len(finished.units)
    assert all(after <= before for before, after in errors)
    assert sum(after < before for before, after in errors) > len(errors) / 2


def test_the_result_is_better_than_the_baseline_at_every_timestep(
    finished: Session, baseline: Session
) -> None:
    """On images that nothing was learned from; a good mean may hide a timestep that got worse."""
    times, reference, quantized = predictions(finished)
    _, same, plain = predictions(baseline)
    assert torch.equal(reference, same)
    for t in times.unique():
        chosen = times == t
        errors = [(y[chosen] - reference[chosen]).square().mean() for y in (quantized, plain)]
        assert errors[0] < errors[1]


def test_codes_are_whole_numbers_next_to_the_weights(finished: Session) -> None:
    for layer in quantized_layers(finished.denoiser).values():
        for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
            assert isinstance(quantizer, WeightQuantizer)
            assert quantizer.codes is not None
            assert quantizer.rounding is None
            scale = quantizer.scale.view(-1, *[1] * (weight.ndim - 1))
            below = (weight / scale).floor()
            low, high = (c.clamp(-8, 7) for c in (below, below + 1))
            assert torch.all((quantizer.codes == low) | (quantizer.codes == high))


# -- learned scales ----------------------------------------------------------------------------------------


def found_activations(session: Session) -> dict[str, ActivationQuantizer]:
    found = quantizers(session.denoiser)
    return {name: quantizer for name, quantizer in found if isinstance(quantizer, ActivationQuantizer)}


def activation_scales(session: Session) -> dict[str, Tensor]:
    return {name: quantizer.scale.clone() for name, quantizer in found_activations(session).items()}


def prepared(session: Session) -> None:
    minmax.WeightRanges(finder="lp").run(session)
    minmax.ActivationRanges(finder="lp").run(session)


@pytest.mark.parametrize("lr", [0.01, 3.0])
def test_learned_scales_stay_positive_and_are_kept_only_if_better(tmp_path: Path, lr: float) -> None:
    """QD-12: steps that are learned as they are can cross zero; a wild learning rate provokes it."""
    used: list[float] = []
    with calibrating(tiny_unet(), DATA, tmp_path / "out", SHORT, weights="int4") as session:
        prepared(session)
        for quantizer in found_activations(session).values():
            quantizer.register_forward_hook(lambda module, args, output: used.append(float(module.scale)))
        walk = UnitWalk(session, session.teacher)
        for unit in session.units:
            problem = walk.problem(unit)
            before, scales = problem.judged(2.4), activation_scales(session)
            kept = qdiffusion.learn_unit(session, problem, unit, lr, 2.4, None)
            after, learned = problem.judged(2.4), activation_scales(session)
            assert after < before if kept else after == before
            assert kept == any(not torch.equal(scales[name], learned[name]) for name in scales)
        assert all(scale > 0 and torch.isfinite(scale) for scale in activation_scales(session).values())
    assert min(used) > 0


@pytest.mark.parametrize("bad", [4.0, torch.nan, -torch.inf])
def test_scales_that_got_worse_are_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """QD-11: learning can diverge; what it leaves then must not reach the checkpoint."""

    def diverge(problem: UnitProblem, parameters: list[nn.Parameter], *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(bad)

    monkeypatch.setattr(qdiffusion, "optimize", diverge)
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        prepared(session)
        before = activation_scales(session)
        qdiffusion.LearnScales().run(session)
        after = activation_scales(session)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scales_see_quantized_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QD-11: the released code learns them from the float network's inputs."""
    seen = 0

    def spy(session: Session, problem: UnitProblem, *settings: object) -> bool:
        nonlocal seen
        assert_inputs_are_live(session, problem)
        seen += 1
        return False

    monkeypatch.setattr(qdiffusion, "learn_unit", spy)
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        prepared(session)
        qdiffusion.LearnScales().run(session)
    assert seen == len(session.units)


def test_learning_leaves_weights_alone(finished: Session, tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out", weights="int4") as session:
        prepared(session)
        for layer in quantized_layers(session.denoiser).values():
            minmax.round_to_nearest(layer)
        before = weights_of(session)
        qdiffusion.LearnScales().run(session)
        after = weights_of(session)
    assert all(torch.equal(before[name], after[name]) for name in before)


def weights_of(session: Session) -> dict[str, Tensor]:
    return {name: value for name, value in read_state(session.denoiser).items() if ".weight." in name}


# -- the same again ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_a_seed_decides_every_code_and_the_budget_none(
    tmp_path: Path, uninterrupted: Session, seed: int
) -> None:
    torch.manual_seed(2)  # what went on before is none of its business
    again = run(tmp_path / "out", method="qdiffusion", weights="int4", seed=seed, max_memory=0)
    assert same_state(again, uninterrupted) == (seed == 3)
    assert not list((again.draft.work / "scratch").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 13, 17])
def test_a_stopped_run_continues_where_it_was_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, uninterrupted: Session
) -> None:
    """``calls`` units are done before the stop: 14 are rounded, then 14 learn their scales."""
    stock: Any = qdiffusion.optimize
    made = SimpleNamespace(count=0, limit=calls)

    def counting(*args: Any, **kwargs: Any) -> None:
        if made.count == made.limit:
            raise Stopped
        made.count += 1
        stock(*args, **kwargs)

    for module in (qdiffusion, rounding):
        monkeypatch.setattr(module, "optimize", counting)
    recipe = {"method": "qdiffusion", "weights": "int4", "seed": 3}
    with pytest.raises(Stopped):
        run(tmp_path / "out", **recipe)
    made.limit = -1
    session = run(tmp_path / "out", **recipe)
    assert made.count == 2 * len(session.units)  # nothing was done twice
    assert same_state(session, uninterrupted)


def test_efforts_grow_in_every_respect() -> None:
    efforts = [EFFORTS[name] for name in ("fast", "balanced", "thorough", "best")]
    for field in ("rows", "batch", "rounding", "scales", "tuning"):
        numbers = [getattr(effort, field) for effort in efforts]
        assert numbers == sorted(numbers)
    best = efforts[-1]
    assert (best.rounding, best.scales, best.batch) == (20_000, 5_000, 32)  # the paper's own
