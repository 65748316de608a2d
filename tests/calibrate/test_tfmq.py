"""TFMQ-DM on real networks: the temporal block as one unit, a range for every timestep, tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate import rounding
from qdeploy.calibrate.methods import tfmq
from qdeploy.calibrate.methods.minmax import WeightRanges, round_to_nearest
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibrate.methods.tfmq import (
    FiniteSetRanges,
    TemporalProblem,
    TemporalRounding,
    TemporalSelection,
    cosine,
    mismatches,
    relative_error,
)
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.session import Session
from qdeploy.model.folder import read_json
from qdeploy.model.inputs import denoise
from qdeploy.network.current_timestep import CurrentTimestep, midpoints
from qdeploy.network.roles import find_structure
from qdeploy.quant.feature_table import FeatureTable
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import full_precision
from qdeploy.quant.operators import fake_quantize
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import to_scale
from qdeploy.quant.state import read_state
from qdeploy.recipe.coverage import covered, find_coverage, float_inputs
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.formats import int8, uint8
from qdeploy.recipe.stages import find_method
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, calibrating, relative, tiny_unet
from tests.models import make

DATA = MemoryRows.noisy(images=12)
TRAINED = 120  # timesteps of training, few enough to walk through all
SHORT = Effort("short", rows=48, batch=16, rounding=150, scales=2)
BRIEF = Effort("brief", rows=24, batch=12, rounding=6, scales=2)
W4 = {"method": "tfmq", "weights": "int4"}

ASYMMETRIC = {"activations": "uint8", "target": "openvino", "effort": BRIEF}


class Rows(MemoryRows):
    """Rows of any network's inputs, at some timesteps."""

    def __init__(self, inputs: dict[str, Tensor], timesteps: Sequence[float]) -> None:
        count = len(timesteps)
        noise = torch.Generator().manual_seed(5)
        rows = {
            name: value.repeat(count, *[1] * (value.ndim - 1))
            + (torch.randn(count, *value.shape[1:], generator=noise) if value.is_floating_point() else 0)
            for name, value in inputs.items()
        }
        super().__init__(rows | {"timestep": torch.tensor(timesteps)}, torch.arange(count))


@contextmanager
def opened(
    output: Path, network: nn.Module | None = None, data: Any = DATA, **recipe: Any
) -> Iterator[Session]:
    """A session of the tiny U-Net, or of another network, that was trained on `TRAINED` timesteps."""
    with calibrating(network or tiny_unet(), data, output, **{"effort": SHORT, **W4, **recipe}) as session:
        session.training_timesteps = TRAINED
        yield session


def features(session: Session, timesteps: Tensor | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        given = session.all_timesteps() if timesteps is None else timesteps
        return session.structure.time(session.denoiser, given)


def exact(session: Session) -> dict[str, Tensor]:
    with session.teacher():
        return features(session)


def block_of(session: Session) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(session.denoiser)
    return {path: layers[path] for path in session.structure.time.layers if path in layers}


def codes_of(session: Session) -> dict[str, Tensor]:
    state = read_state(session.denoiser)
    return {name: value for name, value in state.items() if name.endswith(".codes")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The whole method at W4A8, with zero points: as the paper has them."""
    folder = tmp_path_factory.mktemp("finished")
    with opened(folder / "out", **ASYMMETRIC) as session:
        run_stages(session)
    return session


# -- P1, P3: temporal information aware reconstruction -----------------------------------------------------


def test_the_problem_is_the_block_over_every_timestep_of_training(tmp_path: Path) -> None:
    """P1: its targets are the float network's features; and what is judged by is not learned from."""
    with opened(tmp_path / "out") as session:
        problem = TemporalProblem.open(session)
        expected = torch.cat([torch.arange(TRAINED), torch.tensor([334, 666, 999])])
        assert torch.equal(problem.timesteps, expected)
        for name, target in exact(session).items():
            assert relative(target, problem.targets[name]) < 1e-5
        assert sorted([*problem.learn.tolist(), *problem.judge.tolist()]) == list(range(len(expected)))
        assert len(problem.judge) == len(expected) // 8


def test_the_error_is_summed_over_features_and_values_and_averaged_over_timesteps(tmp_path: Path) -> None:
    """Equation 8; QD-9 would divide it by a size that depends on the layer."""
    with opened(tmp_path / "out") as session:
        WeightRanges().run(session)
        problem = TemporalProblem.open(session)
        rows = torch.tensor([3, 50])
        with session.weights_only():
            student = features(session, problem.timesteps[rows])
        by_hand = sum(
            float((student[name] - problem.targets[name][rows]).square().sum()) / 2 for name in student
        )
        assert float(problem.error(rows, 2)) == pytest.approx(by_hand, rel=1e-4)
        assert by_hand > 0


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TIAR at W4 alone: errors, cosines and mismatches with codes to nearest, and with the learned ones."""
    found: dict[str, Any] = {"loss": [], "cosine": [], "mismatches": []}
    with opened(tmp_path_factory.mktemp("rounded") / "out") as session:
        WeightRanges(finder="lp").run(session)
        problem, target = TemporalProblem.open(session), exact(session)

        def look() -> None:
            with session.weights_only():
                value = features(session)
                found["loss"].append([float(problem.error(r, 2)) for r in (problem.learn, problem.judge)])
            found["cosine"].append(min(float(cosine(value[n], target[n]).min()) for n in target))
            found["mismatches"].append(sum(int(mismatches(value[n], target[n]).sum()) for n in target))

        look()
        TemporalRounding().run(session)
        look()
        found["session"] = session
    return found


def test_learned_rounding_is_nearer_than_nearest(rounded: dict[str, Any]) -> None:
    """P3: on the timesteps that were learned from, and on those that were not."""
    nearest, learned = rounded["loss"]
    assert learned[0] < 0.8 * nearest[0]
    assert learned[1] < 0.8 * nearest[1]


def test_the_worst_cosine_increases_and_mismatches_do_not(rounded: dict[str, Any]) -> None:
    """P3, over all timesteps and features."""
    assert rounded["cosine"][1] > rounded["cosine"][0]
    before, after = rounded["mismatches"]
    assert before > 0
    assert after <= before


def test_codes_of_the_block_are_next_to_its_weights_and_of_no_other_layer_decided(
    rounded: dict[str, Any],
) -> None:
    session = rounded["session"]
    block = block_of(session)
    for path, layer in quantized_layers(session.denoiser).items():
        for quantizer, weight in layer.weight_pairs():
            assert quantizer.rounding is None
            assert (quantizer.codes is not None) == (path in block)
            if quantizer.codes is not None:
                below = (weight / quantizer.scale.view(-1, 1)).floor()
                near = [(below + step).clamp(-8, 7) for step in (0, 1)]
                assert torch.all((quantizer.codes == near[0]) | (quantizer.codes == near[1]))


def test_a_mismatch_is_a_feature_that_looks_like_another_timesteps() -> None:
    target = torch.eye(4)
    value = target.clone()
    value[2] = torch.tensor([0.0, 0.9, 0.1, 0.0])
    assert mismatches(target * 5, target).tolist() == [False] * 4
    assert mismatches(value, target).tolist() == [False, False, True, False]


# -- P5: frozen --------------------------------------------------------------------------------------------


def test_reconstructing_the_blocks_leaves_the_temporal_block_alone(tmp_path: Path) -> None:
    """P5. The released Q-Diffusion learns g_i inside each residual block, to the wrong target."""
    with opened(tmp_path / "out", effort=BRIEF) as session:
        WeightRanges().run(session)
        session.stage = "1-temporal-rounding"
        TemporalRounding().run(session)
        block = set(block_of(session))
        before = codes_of(session)
        assert {name.partition(".weight.")[0] for name in before} == block
        session.stage = "2-round-weights"
        AdaRound().run(session)
        after = codes_of(session)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(after) > len(before)


def test_put_back_the_trap_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: where every weight is rounded anew, residual blocks change their projections."""
    from qdeploy.calibrate.methods import qdiffusion

    effort = Effort("longer", rows=24, batch=12, rounding=20, scales=2)

    def everything(layers: Any) -> Any:
        for layer in layers:
            for quantizer, _ in layer.weight_pairs():
                quantizer.codes = None
        return [pair for layer in layers for pair in layer.weight_pairs()]

    with opened(tmp_path / "out", effort=effort) as session:
        WeightRanges().run(session)
        session.stage = "1-temporal-rounding"
        TemporalRounding().run(session)
        before = codes_of(session)
        monkeypatch.setattr(qdiffusion, "undecided", everything)
        session.stage = "2-round-weights"
        AdaRound().run(session)
        after = codes_of(session)
    assert any(not torch.equal(before[name], after[name]) for name in before)


# -- P2: finite set calibration ----------------------------------------------------------------------------


def activations_of(session: Session) -> dict[str, list[Tensor]]:
    """What each quantizer of the block sees at every timestep, in float, weights quantized."""
    seen: dict[str, list[Tensor]] = {path: [] for path in block_of(session)}
    handles = [
        layer.input_quantizers[0].register_forward_pre_hook(
            lambda module, args, path=path: seen[path].append(args[0].clone())
        )
        for path, layer in block_of(session).items()
    ]
    with session.weights_only():
        features(session)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("activations", "target"), [("int8", "portable"), ("uint8", "openvino")])
def test_no_activation_of_any_timestep_is_clipped(tmp_path: Path, activations: str, target: str) -> None:
    """P2: |x_hat - x| <= delta_t, half of it but for the rounding of the zero point; for every timestep."""
    with opened(tmp_path / "out", activations=activations, target=target) as session:
        WeightRanges().run(session)
        FiniteSetRanges().run(session)
        timesteps = session.all_timesteps()
        for path, seen in activations_of(session).items():
            (quantizer,) = block_of(session)[path].activation_quantizers
            assert quantizer.scale.shape == (len(timesteps),)
            assert torch.equal(quantizer.edges, midpoints(timesteps.float()))
            for number, x in enumerate(seen):
                with quantizer.current_timestep.at(timesteps[number : number + 1]):  # type: ignore[union-attr]
                    error = (quantizer.restore(quantizer(x)) - x).abs().max()
                assert error <= quantizer.scale[number] * (1 + 1e-4)


def test_every_timestep_has_its_own_min_and_max_and_together_they_beat_one_range(tmp_path: Path) -> None:
    """P2: the sum of squared errors over all timesteps, beside one min-max range for all of them."""
    with opened(tmp_path / "out", activations="uint8", target="openvino") as session:
        WeightRanges().run(session)
        FiniteSetRanges().run(session)
        for path, seen in activations_of(session).items():
            (quantizer,) = block_of(session)[path].activation_quantizers
            low = torch.stack([x.min() for x in seen])
            high = torch.stack([x.max() for x in seen])
            scale, zero = to_scale(low, high, uint8)
            assert torch.allclose(quantizer.scale, scale)
            assert torch.equal(quantizer.zero_point, zero)
            one_scale, one_zero = to_scale(low.min(), high.max(), uint8)
            finite = static = 0.0
            for number, x in enumerate(seen):
                finite += float((fake_quantize(x, scale[number], zero[number], 0, 255) - x).square().sum())
                static += float((fake_quantize(x, one_scale, one_zero, 0, 255) - x).square().sum())
            assert finite <= static * 1.001, path


def test_where_all_timesteps_are_alike_it_is_one_static_range() -> None:
    """P2, the reduction: a bank of equal parameters gives the static quantizer's bits."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    banked, static = ActivationQuantizer(uint8), ActivationQuantizer(uint8)
    banked.current_timestep = CurrentTimestep()
    scale, zero = to_scale(x.min(), x.max(), uint8)
    banked.set(scale.expand(3), zero.expand(3), torch.tensor([10.0, 20.0]))
    static.set(scale, zero)
    with banked.current_timestep.at(torch.tensor([1.0, 15.0, 30.0, 11.0, 20.0])):
        assert torch.equal(banked(x), static(x))


def test_shared_quantizers_cover_what_every_reader_sees(finished: Session) -> None:
    """All embedding projections read one tensor, once per projection and timestep."""
    projections = [layer for path, layer in block_of(finished).items() if path.endswith("time_emb_proj")]
    per_unit = {id(layer.input_quantizers[0]) for layer in projections}
    assert len(per_unit) <= len(projections)
    timesteps = finished.all_timesteps()
    assert all(len(layer.activation_quantizers[0].scale) == len(timesteps) for layer in projections)


# -- P4: tables --------------------------------------------------------------------------------------------


def clocked(features: Tensor, storage: str) -> FeatureTable:
    return FeatureTable.stored(
        features, midpoints(torch.arange(float(len(features)))), CurrentTimestep(), storage
    )


def test_a_table_in_float_gives_the_networks_own_output(tmp_path: Path) -> None:
    """P4: with an fp32 table of float features, the prediction of the full-precision network."""
    network = tiny_unet()
    with opened(tmp_path / "out", network, coverage="portable-time") as session:
        reference_features = exact(session)
        edges = midpoints(session.all_timesteps().float())
        with full_precision(network), torch.no_grad():
            reference = denoise(network, DATA.inputs(range(12)))
        for path, layer in quantized_layers(network).items():  # everything else in float
            layer.quantized = path in reference_features
        current = (
            block_of(session)[session.structure.time.features[0]].activation_quantizers[0].current_timestep
        )
        for name, value in reference_features.items():
            quantized_layers(network)[name].table = FeatureTable.stored(value, edges, current, "fp32")
        with torch.no_grad():
            tabled = denoise(network, DATA.inputs(range(12)))
    assert relative(reference, tabled) <= 1e-6


@pytest.mark.parametrize("number_format", [int8, uint8])
def test_a_quantized_table_is_off_by_half_a_step_at_most(number_format: Any) -> None:
    """P4: each timestep has a step of its own, so small features are no worse than large ones."""
    values = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-4, 4, 9).view(9, 1, 1)
    table = FeatureTable.quantized(values, midpoints(torch.arange(9.0)), None, number_format)
    assert table.rows.dtype == (torch.int8 if number_format.symmetric else torch.uint8)
    assert table.scale is not None
    error = (table.values() - values).abs().flatten(1).amax(1)
    slack = 1 if number_format.symmetric else 2  # a zero point that was rounded clips by up to half a step
    assert torch.all(error <= slack * table.scale / 2 * (1 + 1e-5))
    assert table.size == 9 * 10 + 8 * 4 + 9 * 4 + 9


def test_a_table_is_read_by_the_rows_timesteps() -> None:
    values = torch.randn(5, 3)
    for storage, tolerance in (("fp32", 0.0), ("fp16", 2e-3), ("int8", 3e-2)):
        table = clocked(values, storage)
        with table.current_timestep.at(torch.tensor([4.0, 0.4, 2.0, 2.6])):  # type: ignore[union-attr]
            found = table()
        assert torch.allclose(found, values[[4, 0, 2, 3]], atol=tolerance)


def test_selection_takes_the_nearer_of_block_and_table(finished: Session) -> None:
    """P4: argmin for every feature, and never more than the smaller error."""
    report = read_json(finished.draft.content / finished.component / "temporal.json")
    assert report["mode"] == "selected"
    assert set(report["features"]) == set(finished.structure.time.features)
    target, value = exact(finished), features(finished)
    for name, told in report["features"].items():
        errors = told["relative_error"]
        assert told["chosen"] == min(("cache", "block"), key=lambda kind: errors[kind])
        reached = float(relative_error(value[name], target[name]).mean())
        assert reached == pytest.approx(min(errors.values()), rel=1e-3)
        layer = block_of(finished)[name]
        assert (layer.table is not None) == (told["chosen"] == "cache")
        assert -1 <= told["worst_cosine"]["block"] <= 1
        assert 0 <= told["mismatched_timesteps"] <= len(finished.all_timesteps())


@pytest.mark.parametrize(
    ("block", "mode", "chosen"),
    [
        (0.5, "selected", "block"),
        (1.0, "selected", "cache"),  # a tie: the table costs nothing at run time
        (2.0, "selected", "cache"),
        (2.0, "block", "block"),
        (0.5, "cache", "cache"),
    ],
)
def test_a_tie_goes_to_the_table_and_modes_overrule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: float, mode: str, chosen: str
) -> None:
    with opened(tmp_path / "out") as session:
        WeightRanges().run(session)
        FiniteSetRanges().run(session)
        calls = iter([block, 1.0] * len(session.structure.time.features))
        monkeypatch.setattr(
            tfmq, "relative_error", lambda value, target: torch.full((len(value),), next(calls))
        )
        TemporalSelection(mode=mode).run(session)
        report = read_json(session.draft.content / session.component / "temporal.json")["features"]
        assert {told["chosen"] for told in report.values()} == {chosen}
        tables = [block_of(session)[name].table is not None for name in report]
        assert all(tables) if chosen == "cache" else not any(tables)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "out") as session,
        pytest.raises(UsageError, match="choose from selected, block, cache"),
    ):
        TemporalSelection(mode="magic").run(session)


# -- the whole method --------------------------------------------------------------------------------------


def test_the_rest_of_the_network_has_static_scales(finished: Session) -> None:
    """As in the paper; the released code has tables for every quantizer of the model."""
    block = block_of(finished)
    for path, layer in quantized_layers(finished.denoiser).items():
        for quantizer in layer.activation_quantizers:
            assert quantizer.banked == (path in block), path
    assert finished.recipe.timestep_groups == 1


def test_outputs_are_those_of_the_features_that_were_chosen(finished: Session) -> None:
    """Rows of different timesteps in one batch read their own rows of the tables."""
    rows = [0, 1, 2, 3]
    assert len(DATA.timesteps[rows].unique()) == 4
    with torch.no_grad():
        together = denoise(finished.denoiser, DATA.inputs(rows))
        alone = torch.cat([denoise(finished.denoiser, DATA.inputs([row])) for row in rows])
    assert relative(alone, together) < 1e-2


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Session
) -> None:
    """Stopped after the block was rounded and one unit; determinism, with another network's luck before."""

    class Stopped(BaseException):
        pass

    stock, made, allowed = rounding.optimize, [0], [2]

    def counting(*args: Any, **kwargs: Any) -> None:
        if made[0] == allowed[0]:
            raise Stopped
        made[0] += 1
        stock(*args, **kwargs)

    monkeypatch.setattr(rounding, "optimize", counting)
    torch.manual_seed(9)
    with pytest.raises(Stopped), opened(tmp_path / "out", **ASYMMETRIC) as session:
        run_stages(session)
    allowed[0] = -1
    with opened(tmp_path / "out", **ASYMMETRIC) as session:
        run_stages(session)
    # the temporal layers that are units of their own were decided with the block: nothing is left to learn
    learned = [u for u, layers in session.units.items() if any(not layer.temporal for layer in layers)]
    assert made[0] == 1 + len(learned)
    one, other = read_state(session.denoiser), read_state(finished.denoiser)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [s.draft.content / s.component / "temporal.json" for s in (session, finished)]
    assert reports[0].read_bytes() == reports[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["class_unet", "sdxl_unet", "dit"])
def test_where_conditions_enter_only_what_comes_before_them_is_tabled(family: str, tmp_path: Path) -> None:
    """The fallback: the embedding of the timestep; projections that see the class are ordinary layers."""
    network, inputs = make(family)
    data = Rows(inputs, [1.0, 40.0, 77.0, 119.0] * 3)
    with opened(tmp_path / "out", network, data, effort=BRIEF) as session:
        run_stages(session)
        time = session.structure.time
        block = block_of(session)
        assert set(block) == set(time.layers)
        tabled = [path for path, layer in quantized_layers(network).items() if layer.table is not None]
        assert set(tabled) <= set(time.features)
        for path, layer in quantized_layers(network).items():
            assert all(q.banked == (path in block) for q in layer.activation_quantizers)
        rows = data.inputs(range(4))
        with torch.no_grad():
            quantized = denoise(network, rows)
            with full_precision(network):
                reference = denoise(network, rows)
        assert relative(reference, quantized) < 0.5


def test_a_feature_that_a_recipe_excludes_is_left_as_it_is(tmp_path: Path) -> None:
    with opened(tmp_path / "out", effort=BRIEF, exclude=("down_blocks.*", "*linear_1")) as session:
        run_stages(session)
        report = read_json(session.draft.content / session.component / "temporal.json")["features"]
        excluded = {name for name in session.structure.time.features if name.startswith("down_blocks.")}
        assert len(excluded) == 2
        assert set(report) == set(session.structure.time.features) - excluded


# -- coverage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [TemporalRounding, FiniteSetRanges, TemporalSelection])
def test_a_coverage_without_temporal_layers_is_refused(tmp_path: Path, stage: Any) -> None:
    with (
        opened(tmp_path / "out", coverage="portable") as session,
        pytest.raises(UsageError, match=r"portable quantizes nothing .*choose --coverage portable-time"),
    ):
        stage().run(session)


def test_the_method_brings_a_coverage_of_its_own(tmp_path: Path) -> None:
    assert find_method("tfmq").coverage == "portable-time"
    with opened(tmp_path / "out") as session:
        assert session.recipe.coverage == "portable-time"
        assert set(block_of(session)) == set(session.structure.time.layers)


def test_the_papers_coverage_is_that_of_its_released_code() -> None:
    """TFMQ-2 finds these by index, which breaks for other architectures; here they have roles.

    Float: the first layer of h, conv_in, conv_out, shortcuts and downsampling. Float inputs: h's second
    layer and the first convolution of the first residual block.
    """
    structure = find_structure(tiny_unet(), DATA.inputs([0]))
    coverage = find_coverage("tfmq-paper")
    layers = covered(structure, coverage)
    paths = {layer.path for layer in layers}
    left = {layer.path for layer in structure.layers} - paths
    by_name = {
        path
        for path in (layer.path for layer in structure.layers)
        if path in ("conv_in", "conv_out", "time_embedding.linear_1")
        or "shortcut" in path
        or "downsampler" in path
    }
    assert {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.resnets.0.conv_shortcut"} <= by_name
    assert left - by_name <= {layer.path for layer in structure.layers if layer.resamples}
    assert by_name <= left
    assert float_inputs(layers, coverage) == {"time_embedding.linear_2", "down_blocks.0.resnets.0.conv1"}
    assert not coverage.split
    assert not coverage.attention


def test_layers_whose_input_stays_float_have_no_quantizer(tmp_path: Path) -> None:
    with opened(tmp_path / "out", coverage="tfmq-paper") as session:
        bare = {
            path for path, layer in quantized_layers(session.denoiser).items() if not layer.input_quantizers
        }
        assert bare == {"time_embedding.linear_2", "down_blocks.0.resnets.0.conv1"}
        WeightRanges().run(session)
        for layer in quantized_layers(session.denoiser).values():
            round_to_nearest(layer)
        FiniteSetRanges().run(session)
        assert torch.isfinite(denoise(session.denoiser, DATA.inputs([0, 1]))).all()


def test_weights_alone_have_no_finite_set(tmp_path: Path) -> None:
    with opened(tmp_path / "out", activations="none") as session:
        WeightRanges().run(session)
        FiniteSetRanges().run(session)
        assert not any(layer.input_quantizers for layer in quantized_layers(session.denoiser).values())
