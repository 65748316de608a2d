"""Groups of timesteps: cut where noise is least, observed right, and exact when hoisted out of Q/DQ."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.timestep_groups import best_cuts, check_groups, find_edges
from qdeploy.model.inputs import denoise
from qdeploy.network.current_timestep import CurrentTimestep, midpoints
from qdeploy.quant.activation_finders import ACTIVATION_FINDERS
from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.feature_table import FeatureTable
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import full_precision
from qdeploy.quant.one_zero_point import with_one_zero_point
from qdeploy.quant.operators import fake_quantize
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.quant.state import code_shapes, quantizers, read_state, write_state
from qdeploy.quant.time_ranges import ranges_by_timestep
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.formats import int8, uint8
from qdeploy.store.artifact import RANGES
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from tests.helpers import MemoryRows, calibrating, relative, tiny_unet

DATA = MemoryRows.noisy(steps=6)
EVERY = Effort("every", rows=96, batch=20, rounding=4, scales=2)  # of the rows, so that nothing is clipped
EDGES = torch.tensor([250.0, 600.0])
BANK = torch.tensor([0.01, 0.03, 0.09])


def noise_of(spans: Tensor, cuts: list[int]) -> float:
    """The quantity that cuts are to minimise, written down a second time: sum of squared steps."""
    total = 0.0
    for row in spans.double():
        row = row / row.max()
        for begin, end in itertools.pairwise([0, *cuts, len(row)]):
            total += (end - begin) * float(row[begin:end].max()) ** 2
    return total


# -- where to cut ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_the_best_of_all_partitions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spans = torch.rand(3, 7, generator=generator) * torch.tensor([[0.01], [1.0], [50.0]])
    for groups in range(1, 8):
        cuts = best_cuts(spans, groups)
        every = [list(chosen) for chosen in itertools.combinations(range(1, 7), groups - 1)]
        assert cuts in every
        assert noise_of(spans, cuts) == pytest.approx(min(noise_of(spans, other) for other in every))


def test_more_groups_are_never_noisier() -> None:
    spans = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) + 0.1
    noise = [noise_of(spans, best_cuts(spans, groups)) for groups in range(1, 13)]
    assert noise[0] == 60  # one scale for all: every quantizer counts alike
    assert all(more <= fewer + 1e-9 for fewer, more in itertools.pairwise(noise))


def test_a_jump_is_found_and_quantizers_of_any_size_count_alike() -> None:
    spans = torch.tensor([[1.0, 1.0, 1.0, 8.0, 8.0], [1e-4, 1e-4, 1e-4, 8e-4, 8e-4]])
    assert best_cuts(spans, 2) == [3]
    assert best_cuts(spans, 1) == []
    opposed = torch.tensor([[1.0, 1.0, 5.0], [1e6, 2e6, 2e6]])  # the larger numbers must not outvote
    assert best_cuts(opposed, 2) == [2]


def test_a_quantizer_that_sees_only_zero_has_no_say() -> None:
    spans = torch.tensor([[0.0, 0.0, 0.0], [1.0, 9.0, 9.0]])
    assert best_cuts(spans, 2) == [1]


def test_edges_lie_between_calibrated_timesteps() -> None:
    ranges = {
        "timesteps": torch.tensor([1.0, 101.0, 901.0]),
        "a.low": torch.tensor([-1.0, -1.0, -9.0]),
        "a.high": torch.tensor([0.5, 0.5, 0.5]),
    }
    assert find_edges(2, ranges).tolist() == [501.0]
    assert find_edges(3, ranges).tolist() == [51.0, 501.0]
    assert find_edges(1, ranges).tolist() == []
    assert find_edges((33.0, 700.0), ranges).tolist() == [33.0, 700.0]
    assert find_edges(4, {"timesteps": torch.tensor([1.0])}).tolist() == []  # nothing is quantized


def test_given_boundaries_are_the_largest_timesteps_of_their_groups() -> None:
    current = CurrentTimestep()
    with current.at(torch.tensor([0.0, 200.0, 200.5, 500.0, 501.0])):
        assert current.index(find_edges((200.0, 500.0), {})).tolist() == [0, 0, 1, 1, 2]


# -- what is refused ---------------------------------------------------------------------------------------


def test_more_groups_than_timesteps_are_refused() -> None:
    seen = torch.tensor([1, 1, 500, 999])
    check_groups(3, seen)
    with pytest.raises(UsageError, match=r"4 groups .* 3 calibrated timesteps.*at most 3"):
        check_groups(4, seen)


@pytest.mark.parametrize(
    ("groups", "between"),
    [
        ((0.5, 400.0), "the lowest and 0.5"),
        ((600.0, 700.0), "600 and 700"),
        ((999.0,), "999 and the highest"),
    ],
)
def test_a_group_without_timesteps_is_refused(groups: tuple[float, ...], between: str) -> None:
    seen = torch.tensor([1, 500, 999])
    with pytest.raises(UsageError, match=between):
        check_groups(groups, seen)
    check_groups((1.0, 500.0), seen)


# -- ranges over time --------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_rows_of_each_timestep(tmp_path: Path) -> None:
    """Of quantizers that q, k and v share too, which see every batch three times; the last batch is short."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        rows = session.rows()
        assert len(rows) % session.effort.batch
        found = minmax.summarize(session)
        ranges = ranges_by_timestep({name: summary for name, _, summary in found})
        readers = [
            sum(q is quantizer for layer in session.quantized(session.layers) for q in layer.input_quantizers)
            for _, quantizer, _ in found
        ]
        assert max(readers) == 3
        times = DATA.timesteps[rows].float()
        assert torch.equal(ranges["timesteps"], times.unique())
        for number in (0, 3, 5):
            timestep = ranges["timesteps"][number]
            chosen = [row for row, t in zip(rows, times, strict=True) if t == timestep]
            for name, low, high in live_ranges(session, chosen):
                assert float(ranges[f"{name}.low"][number]) == pytest.approx(low, rel=1e-4, abs=1e-6)
                assert float(ranges[f"{name}.high"][number]) == pytest.approx(high, rel=1e-4, abs=1e-6)


def live_ranges(session: Session, rows: list[int]) -> list[tuple[str, float, float]]:
    """Extremes of what every quantizer sees in one pass over some rows."""
    seen: dict[str, tuple[float, float]] = {}
    handles = []
    for name, quantizer in quantizers(session.denoiser):
        if isinstance(quantizer, ActivationQuantizer):

            def before(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = float(args[0].min()), float(args[0].max())

            handles.append(quantizer.register_forward_pre_hook(before))
    with torch.no_grad(), session.weights_only():
        denoise(session.denoiser, session.inputs(rows))
    for handle in handles:
        handle.remove()
    return [(name, *extremes) for name, extremes in seen.items()]


def test_folded_rows_keep_their_timesteps() -> None:
    """Attention folds heads into the first axis; each head is then a row of its image's timestep."""
    summary = ActivationStatistics()
    summary.observe(torch.tensor([[1.0], [2.0], [30.0], [40.0]]), torch.tensor([5.0, 900.0]))
    ranges = ranges_by_timestep({"a": summary})
    assert ranges["a.low"].tolist() == [1.0, 30.0]
    assert ranges["a.high"].tolist() == [2.0, 40.0]


def test_a_group_summarises_its_own_rows_alone() -> None:
    summary = ActivationStatistics(by_timestep=True)
    summary.observe(torch.tensor([[1.0, -1.0], [5.0, -2.0]]), torch.tensor([100.0, 500.0]))
    summary.observe(torch.tensor([[0.5, -7.0]]), torch.tensor([100.0]))
    low, high = summary.groups(torch.tensor([300.0]))
    assert (low.low, low.high) == (-7.0, 1.0)
    assert (high.low, high.high) == (-2.0, 5.0)
    assert [int(part.histogram.counts.sum()) for part in (low, high)] == [4, 2]
    assert summary.groups(torch.zeros(0)) == [summary]


# -- a bank ------------------------------------------------------------------------------------------------


def bank(scale: Tensor = BANK, edges: Tensor = EDGES, number_format: Any = int8) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(number_format)
    zero = torch.zeros_like(scale) if number_format.symmetric else torch.arange(len(scale)) * 40
    quantizer.set(scale, zero, edges)
    quantizer.current_timestep = CurrentTimestep()
    return quantizer


def at(quantizer: ActivationQuantizer, timesteps: Tensor) -> Any:
    assert quantizer.current_timestep is not None
    return quantizer.current_timestep.at(timesteps)


def activations(rows: int = 4, *shape: int) -> Tensor:
    return torch.randn(rows, *(shape or (6, 5, 5)), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("number_format", [int8, uint8])
def test_one_group_is_stored_as_a_plain_scale_and_gives_the_same_bits(number_format: Any) -> None:
    plain, single = ActivationQuantizer(number_format), ActivationQuantizer(number_format)
    plain.set(torch.tensor(0.02), torch.tensor(0 if number_format.symmetric else 9))
    single.set(plain.scale[None], plain.zero_point[None], torch.zeros(0))
    assert single.scale.ndim == single.zero_point.ndim == 0
    assert not single.banked
    x = activations()
    assert torch.equal(single(x), plain(x))  # and no timestep is asked for
    y = activations()
    assert single.restore(y) is y


def test_each_row_has_the_scale_of_its_timestep() -> None:
    """P10, of the quantizer alone: restored, it is fake quantization with the row's own scale."""
    quantizer, x = bank(), activations(5)
    timesteps = torch.tensor([999.0, 10.0, 600.0, 250.0, 250.5])
    with at(quantizer, timesteps):
        restored = quantizer.restore(quantizer(x))
    for row, group in enumerate([2, 0, 1, 0, 1]):
        direct = fake_quantize(x[row], BANK[group], torch.tensor(0), -128, 127)
        assert relative(direct, restored[row]) < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear", "split"])
def test_hoisted_is_the_direct_form_for_every_timestep(kind: str, frozen: bool) -> None:
    """P10: conv(fq_s[t](x)) + b, with the factor s[t] / s0 between the product and the bias."""
    torch.manual_seed(0)
    inner: nn.Module = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(6, 4, 3, padding=1)
    split = (2, 4) if kind == "split" else ()
    layer = QuantizedLayer(inner.requires_grad_(False), int8, int8, split)
    current = CurrentTimestep()
    other = BANK.flip(0) * 1.7
    for number, quantizer in enumerate(layer.activation_quantizers):
        quantizer.set(other if number else BANK, torch.zeros(3), EDGES)
        quantizer.current_timestep = current
    for weight_quantizer, weight in layer.weight_pairs():
        weight_quantizer.set(*minmax_weights(weight, int8))
        weight_quantizer.codes = weight_quantizer.nearest(weight)
    if frozen:
        for quantizer in (*layer.weight_quantizers, *layer.input_quantizers):
            quantizer.freeze()  # type: ignore[operator]
    x = activations(2, 5, 6) if kind == "linear" else activations(2)
    for timestep in (0.0, 100.0, 249.5, 250.0, 251.0, 599.0, 601.0, 999.0):
        group = int(timestep > 250) + int(timestep > 600)
        with current.at(torch.tensor([timestep, timestep])), torch.no_grad():
            hoisted = layer(x)
        direct = torch.zeros(())
        weights = layer.quantized_weights()
        for number, (part, weight) in enumerate(zip(layer.input_parts(x), weights, strict=True)):
            scale = (other if number else BANK)[group]
            seen = fake_quantize(part, scale, torch.tensor(0), -128, 127)
            direct = direct + layer.operate(seen, weight, None if number else layer.bias)
        assert relative(direct, hoisted) < 1e-5


def test_rows_of_mixed_timesteps_are_as_one_by_one(tmp_path: Path) -> None:
    session = calibrated(tmp_path, groups=3)
    inputs = DATA.inputs(range(6))
    assert len(inputs["timestep"].unique()) == 6
    with torch.no_grad():
        together = denoise(session.denoiser, inputs)
        alone = [denoise(session.denoiser, DATA.inputs([row])) for row in range(6)]
    assert relative(torch.cat(alone), together) < 2e-2  # a code that sits on a boundary may fall either way
    assert torch.median((torch.cat(alone) - together).flatten(1).norm(dim=1)) < 1e-4


def test_gradient_reaches_the_scale_of_every_group_and_no_other() -> None:
    quantizer, x = bank(), activations(2)
    scale = BANK.clone().requires_grad_()
    quantizer.scale = scale
    for timesteps, touched in (([10.0, 999.0], [True, False, True]), ([300.0, 300.0], [False, True, False])):
        with at(quantizer, torch.tensor(timesteps)):
            y = quantizer.restore(quantizer(x))
        (gradient,) = torch.autograd.grad((y - x).square().sum(), scale)
        assert (gradient != 0).tolist() == touched


def test_a_hoisted_gradient_is_that_of_the_direct_form() -> None:
    """The nominal scale is a detail of the computation: no gradient goes through it."""
    quantizer, x = bank(), activations(3)
    scale = BANK.clone().requires_grad_()
    quantizer.scale = scale
    with at(quantizer, torch.tensor([10.0, 300.0, 999.0])):
        hoisted = (quantizer.restore(quantizer(x)) - x).square().sum()
    direct = (fake_quantize(x, scale.view(3, 1, 1, 1), torch.tensor(0), -128, 127) - x).square().sum()
    (mine,), (theirs,) = torch.autograd.grad(hoisted, scale), torch.autograd.grad(direct, scale)
    assert torch.allclose(mine, theirs, rtol=1e-3)


def test_a_zero_point_that_moves_is_never_hoisted_and_cannot_be_exported() -> None:
    quantizer, x = bank(number_format=uint8), activations(2)
    assert quantizer.banked
    assert not quantizer.hoisted
    with at(quantizer, torch.tensor([300.0, 999.0])):
        y = quantizer(x)
        assert quantizer.restore(y) is y
    for row, group in enumerate((1, 2)):
        assert torch.equal(y[row], fake_quantize(x[row], BANK[group], torch.tensor(40 * group), 0, 255))
    with pytest.raises(CapabilityError, match="zero point that moves"):
        quantizer.freeze()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear", "split"])
def test_one_zero_point_for_all_groups_is_hoisted_exactly(kind: str, frozen: bool) -> None:
    """As with symmetric codes; the convolution's padding is the code of zero."""
    torch.manual_seed(0)
    inner: nn.Module = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(6, 4, 3, padding=1)
    layer = QuantizedLayer(inner.requires_grad_(False), int8, uint8, (2, 4) if kind == "split" else ())
    current = CurrentTimestep()
    for number, quantizer in enumerate(layer.activation_quantizers):
        quantizer.set(BANK, torch.tensor(100 + number), EDGES)
        quantizer.current_timestep = current
        assert quantizer.hoisted
    for weight_quantizer, weight in layer.weight_pairs():
        weight_quantizer.set(*minmax_weights(weight, int8))
        weight_quantizer.codes = weight_quantizer.nearest(weight)
    if frozen:
        for quantizer in (*layer.weight_quantizers, *layer.input_quantizers):
            quantizer.freeze()  # type: ignore[operator]
    x = activations(2, 5, 6) if kind == "linear" else activations(2)
    for group, timestep in enumerate((100.0, 300.0, 999.0)):
        with current.at(torch.tensor([timestep, timestep])), torch.no_grad():
            hoisted = layer(x)
        direct = torch.zeros(())
        parts = zip(layer.input_parts(x), layer.quantized_weights(), strict=True)
        for number, (part, weight) in enumerate(parts):
            seen = fake_quantize(part, BANK[group], torch.tensor(100 + number), 0, 255)
            direct = direct + layer.operate(seen, weight, None if number else layer.bias)
        assert relative(direct, hoisted) < 1e-5


def statistics_of(*values: Tensor) -> list[ActivationStatistics]:
    found = []
    for each in values:
        statistics = ActivationStatistics()
        statistics.observe(each)
        found.append(statistics)
    return found


@pytest.mark.parametrize("finder", ["minmax", "lp", "percentile"])
def test_ranges_of_one_shape_lose_nothing_by_one_zero_point(finder: str) -> None:
    x = nn.functional.silu(3 * torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)))
    groups = statistics_of(x, 10 * x)
    scales, zero_point = with_one_zero_point(groups, finder, uint8)
    assert zero_point.ndim == 0
    own = [ACTIVATION_FINDERS[finder](group, uint8)[0] for group in groups]
    assert torch.allclose(scales, torch.stack(own), rtol=2e-2)


def test_the_one_zero_point_is_the_best_of_all_codes() -> None:
    """Against a search over all codes, for ranges that differ in shape; nothing that was seen is clipped."""
    ends = torch.tensor([[-1.0, 3.0], [-2.0, 2.0], [-0.5, 9.0], [0.0, 0.0]])
    scales, zero_point = with_one_zero_point(statistics_of(*ends[:, None].unbind()), "minmax", uint8)
    own, _ = to_scale(ends[:, 0], ends[:, 1], uint8)

    def steps(code: int) -> Tensor:
        down = ends[:, 0].neg() / code if code else torch.where(ends[:, 0] < 0, torch.inf, 0.0)
        up = ends[:, 1] / (255 - code) if code < 255 else torch.where(ends[:, 1] > 0, torch.inf, 0.0)
        return torch.maximum(down, up)

    noise = [float((steps(code)[:3] / own[:3]).square().sum()) for code in range(256)]
    reached = float((scales[:3] / own[:3]).square().sum())
    assert reached == pytest.approx(min(noise), rel=1e-2)
    for scale, (low, high) in zip(scales[:3], ends[:3], strict=True):
        assert (0 - zero_point) * scale <= low + 0.5 * scale
        assert (255 - zero_point) * scale >= high - 0.5 * scale
    assert bool((scales > 0).all())


def test_groups_of_a_calibration_with_zero_points_share_one_and_its_state_is_kept(tmp_path: Path) -> None:
    recipe = {"activations": "uint8", "target": "openvino", "timestep_groups": 3}
    with calibrating(tiny_unet(), DATA, tmp_path / "out", effort=EVERY, **recipe) as session:
        run_stages(session)
        state = read_state(session.denoiser)
        banked = [q for _, q in quantizers(session.denoiser) if isinstance(q, ActivationQuantizer)]
        assert all(q.banked and q.hoisted and not q.zero_point.ndim for q in banked)
        assert any(int(q.zero_point) not in (0, 128) for q in banked)
        write_state(session.denoiser, state, code_shapes(session.denoiser))
        assert all(torch.equal(value, state[name]) for name, value in read_state(session.denoiser).items())


def test_frozen_ratios_are_positive_and_undo_each_other() -> None:
    quantizer = bank()
    quantizer.freeze()
    assert quantizer.frozen is not None
    assert quantizer.frozen.dtype == torch.int8
    assert int(quantizer.frozen) == 0
    to, back = quantizer.to_nominal, quantizer.from_nominal
    assert torch.all(to > 0)
    assert torch.allclose(to * back, torch.ones(3))
    assert float(quantizer.nominal) == pytest.approx(float(BANK.prod()) ** (1 / 3))


def test_folded_heads_take_the_scale_of_their_row() -> None:
    """Operands of attention may have rows times heads on the first axis."""
    attention = AttentionQuantizers(int8, uint8)
    current = CurrentTimestep()
    for quantizer in attention.children():
        quantizer.current_timestep = current  # type: ignore[assignment]
    attention.query.set(BANK, torch.zeros(3), EDGES)
    x = activations(4, 5, 3)  # two rows of two heads each
    with current.at(torch.tensor([10.0, 999.0])):
        folded = attention.query.restore(attention.query(x))
    for row, group in enumerate((0, 0, 2, 2)):
        direct = fake_quantize(x[row], BANK[group], torch.tensor(0), -128, 127)
        assert relative(direct, folded[row]) < 1e-5


# -- a calibration -----------------------------------------------------------------------------------------


def calibrated(folder: Path, groups: int | tuple[float, ...], **recipe: Any) -> Session:
    with calibrating(
        tiny_unet(), DATA, folder / f"out-{groups}", EVERY, timestep_groups=groups, **recipe
    ) as session:
        run_stages(session)
    return session


def banks(session: Session) -> list[ActivationQuantizer]:
    return [q for _, q in quantizers(session.denoiser) if isinstance(q, ActivationQuantizer)]


def test_every_scale_covers_its_group_and_no_other(tmp_path: Path) -> None:
    """Each group's min-max scale, from the ranges that were kept beside the checkpoint."""
    session = calibrated(tmp_path, groups=3)
    ranges = load_file(session.draft.content / session.component / RANGES)
    edges = banks(session)[0].edges
    assert len(edges) == 2
    group = torch.bucketize(ranges["timesteps"], edges)
    for name, quantizer in quantizers(session.denoiser):
        if not isinstance(quantizer, ActivationQuantizer):
            continue
        assert torch.equal(quantizer.edges, edges)  # all change scales at the same timesteps
        for number in range(3):
            low = ranges[f"{name}.low"][group == number].min()
            high = ranges[f"{name}.high"][group == number].max()
            assert quantizer.scale[number] == to_scale(low, high, int8)[0]


@pytest.mark.parametrize("recipe", [{}, pytest.param({"method": "qdiffusion"}, marks=pytest.mark.slow)])
def test_one_group_is_bit_identical_to_none(tmp_path: Path, recipe: dict[str, Any]) -> None:
    session = calibrated(tmp_path, groups=1, **recipe)
    with calibrating(tiny_unet(), DATA, tmp_path / "plain", EVERY, **recipe) as plain:
        run_stages(plain)
    one, other = read_state(session.denoiser), read_state(plain.denoiser)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(name.endswith(".edges") for name in one)


def test_one_scale_for_all_is_no_better_than_the_bank(tmp_path: Path) -> None:
    """P11, for every quantized tensor: noise summed over rows, with the scales that min-max found."""
    session, collapsed = calibrated(tmp_path, groups=4), calibrated(tmp_path, groups=1)
    noise: dict[str, list[float]] = {}
    for one in (session, collapsed):
        for name, quantizer in quantizers(one.denoiser):
            if isinstance(quantizer, ActivationQuantizer):
                noise.setdefault(name, []).append(0.0)

                def after(
                    module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
                ) -> None:
                    assert isinstance(module, ActivationQuantizer)
                    noise[name][-1] += float((module.restore(output) - args[0]).square().sum())

                quantizer.register_forward_hook(after)
        with torch.no_grad():
            denoise(one.denoiser, one.inputs(range(len(DATA))))
    assert len(noise) == len(banks(session))
    assert all(len(found) == 2 for found in noise.values())
    assert sum(banked for banked, _ in noise.values()) < sum(static for _, static in noise.values())
    assert sum(banked <= 1.02 * static for banked, static in noise.values()) >= 0.9 * len(noise)


def test_the_prediction_is_no_worse_with_a_bank(tmp_path: Path) -> None:
    """P11, of the whole network."""
    errors = []
    for groups in (1, 6):
        session = calibrated(tmp_path, groups=groups)
        inputs = DATA.inputs(range(len(DATA)))
        with torch.no_grad():
            quantized = denoise(session.denoiser, inputs)
            with full_precision(session.denoiser):
                errors.append(relative(denoise(session.denoiser, inputs), quantized))
    assert errors[1] <= errors[0]


@pytest.mark.slow
def test_learned_scales_keep_a_bank_a_bank(tmp_path: Path) -> None:
    session = calibrated(tmp_path, groups=2, method="qdiffusion")
    assert all(q.scale.shape == (2,) and torch.all(q.scale > 0) for q in banks(session))


# -- stored and loaded -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Banks, and a table in a layer's place."""
    session = calibrated(tmp_path_factory.mktemp("stateful"), groups=3)
    layer = next(iter(quantized_layers(session.denoiser).values()))
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    layer.table = FeatureTable.quantized(
        features, midpoints(torch.arange(4.0)), banks(session)[0].current_timestep
    )
    return session


def changed(state: dict[str, Tensor], ending: str, make: Any) -> dict[str, Tensor]:
    name = next(name for name in state if name.endswith(ending) and name.replace(ending, ".edges") in state)
    return {**state, name: make(state[name])}


def test_banks_and_tables_survive_being_written_and_read(stateful: Session, tmp_path: Path) -> None:
    state = read_state(stateful.denoiser)
    assert any(name.endswith(".feature.rows") for name in state)
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as other:
        write_state(other.denoiser, state, code_shapes(other.denoiser))
        again = read_state(other.denoiser)
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)
        assert all(state[name].dtype == again[name].dtype for name in state)
        inputs = DATA.inputs([0, 5])
        path = next(iter(quantized_layers(other.denoiser)))
        for session in (other, stateful):  # the table is no feature of this network: only its numbers count
            quantized_layers(session.denoiser)[path].table = None
        with torch.no_grad():
            assert torch.equal(denoise(other.denoiser, inputs), denoise(stateful.denoiser, inputs))


@pytest.mark.parametrize(
    ("ending", "make"),
    [
        (".scale", lambda x: x[:-1]),
        (".scale", lambda x: x[0]),
        (".zero_point", lambda x: x[:-1]),
        (".edges", lambda x: x[:-1]),
        (".edges", lambda x: torch.cat([x, x[-1:] + 1])),
    ],
)
def test_a_bank_of_another_shape_is_refused(
    stateful: Session, tmp_path: Path, ending: str, make: Any
) -> None:
    state = read_state(stateful.denoiser)
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as other:
        broken = changed(state, ending, make)
        with pytest.raises(InvalidInputError, match="does not fit its groups"):
            write_state(other.denoiser, broken, code_shapes(other.denoiser))


def test_a_scale_that_is_missing_is_refused(stateful: Session, tmp_path: Path) -> None:
    state = read_state(stateful.denoiser)
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as other:
        state.pop(next(name for name in state if name.endswith("input.0.scale")))
        with pytest.raises(InvalidInputError, match="lack the tensor"):
            write_state(other.denoiser, state, code_shapes(other.denoiser))


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("rows", lambda x: x[:-1]),
        ("edges", lambda x: x[:-1]),
        ("edges", None),
        ("scale", lambda x: x[:-1]),
        ("scale", None),
        ("zero_point", lambda x: x[:-1]),
        ("zero_point", None),
    ],
)
def test_a_table_of_another_shape_is_refused(stateful: Session, tmp_path: Path, what: str, make: Any) -> None:
    layer = next(iter(quantized_layers(stateful.denoiser).values()))
    features = torch.randn(4, 8)
    layer.table = FeatureTable.quantized(features, midpoints(torch.arange(4.0)), None)
    state = read_state(stateful.denoiser)
    name = next(name for name in state if name.endswith(f".feature.{what}"))
    broken = dict(state)
    value = broken.pop(name)
    if make is not None:
        broken[name] = make(value)
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as other, pytest.raises(InvalidInputError):
        write_state(other.denoiser, broken, code_shapes(other.denoiser))
