"""Placement by measurement: what can be switched, what each switch costs, and what is taken."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qdeploy.engines import placement
from qdeploy.engines.base import Kernel
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.measure import row_by_row
from qdeploy.engines.placement import place
from qdeploy.engines.placement.assign import Noise, keep_within, least, quantizing_times, times_by_product
from qdeploy.engines.placement.noise import GATES, with_gates
from qdeploy.engines.placement.switches import find_switches, take_out
from qdeploy.store.artifact import Artifact
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.system.errors import CheckFailed, QDeployError, UsageError
from tests.engines.bundles import denoiser_graph, example_inputs, expected, write_bundle
from tests.helpers import plain_options

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model() -> ir.Model:
    return ir.from_proto(denoiser_graph(True))


def run(graph: ir.Model, gates: list[bool] | None = None) -> torch.Tensor:
    """What a graph computes for the example rows, by ONNX Runtime, unoptimized."""
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), plain_options())
    inputs, rows = example_inputs(), []
    for x, t in zip(inputs["sample"], inputs["timestep"], strict=True):
        feeds = {"sample": x[None].numpy(), "timestep": t.numpy()}
        if gates is not None:
            feeds[GATES] = torch.tensor(gates).numpy()
        rows.append(torch.from_numpy(session.run(None, feeds)[0]))
    return torch.cat(rows)


def median(values: list[float]) -> float:
    return float(torch.tensor(values).quantile(0.5))


def test_switches_are_the_quantizers_that_products_read() -> None:
    assert [(switch.name, switch.products) for switch in find_switches(model())] == [
        ("act_conv/q", ("body.conv",)),
        ("act_linear/q", ("body.linear",)),
    ]
    assert find_switches(ir.from_proto(denoiser_graph(False))) == []


def test_integers_that_something_else_reads_are_no_switch() -> None:
    graph = model()
    quantize = next(node for node in graph.graph if node.name == "act_conv/q")
    reader = ir.node("Identity", [quantize.outputs[0]], name="reader")
    quantize.append([reader])
    assert [switch.name for switch in find_switches(graph)] == ["act_linear/q"]


def test_taking_all_out_leaves_the_rounded_weights_alone() -> None:
    """No integer is left, and the function is that of the quantized graph whose activations are not rounded."""
    graph = take_out(model(), {"act_conv/q", "act_linear/q"})
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in proto.graph.node}
    by_hand = denoiser_graph(True)
    skipped = {"act_conv/dq:0": "act_conv/q", "act_linear/dq:0": "act_linear/q"}
    sources = {node.name: node.input[0] for node in by_hand.graph.node}
    for node in by_hand.graph.node:
        for index, name in enumerate(node.input):
            if name in skipped:
                node.input[index] = sources[skipped[name]]
    torch.testing.assert_close(run(graph), expected(by_hand, example_inputs()), **CLOSE)


def test_what_is_not_taken_out_stays_as_it_is() -> None:
    graph = take_out(model(), {"act_linear/q"})
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("DequantizeLinear") == 2
    assert [switch.name for switch in find_switches(graph)] == ["act_conv/q"]


@pytest.mark.parametrize("gates", product([False, True], repeat=2))
def test_gates_compute_every_placement(gates: tuple[bool, bool]) -> None:
    switches = find_switches(model())
    gated = with_gates(model(), switches)
    out = {switch.name for switch, on in zip(switches, gates, strict=True) if not on}
    torch.testing.assert_close(run(gated, list(gates)), run(take_out(model(), out)), **CLOSE)


@settings(max_examples=60, deadline=None)
@example(items=[(1, 0), (1, 1)], hundredths=-1)  # what costs nothing is kept where nothing is left to spend
@given(
    st.lists(st.tuples(st.integers(-100, 100), st.integers(0, 100)), min_size=1, max_size=7),
    st.integers(-50, 400),
)
def test_the_knapsack_is_solved_exactly(items: list[tuple[int, int]], hundredths: int) -> None:
    gains, noises = [gain / 100 for gain, _ in items], [noise / 100 for _, noise in items]
    allowance = hundredths / 100 + 1e-6  # sums of floats may be off by less
    kept = keep_within(gains, noises, allowance)
    taken = [(g, n) for g, n, here in zip(gains, noises, kept, strict=True) if here]
    assert all(gain > 0 for gain, _ in taken)
    assert sum(noise for _, noise in taken) <= max(0, allowance) + 1e-5
    best = max(
        sum(g for g, here in zip(gains, choice, strict=True) if here)
        for choice in product([False, True], repeat=len(items))
        if sum(n for n, here in zip(noises, choice, strict=True) if here) <= max(0, allowance)
    )
    assert sum(gain for gain, _ in taken) >= best - 1e-5


def test_without_an_allowance_whatever_saves_time_is_kept() -> None:
    assert keep_within([0.5, -0.1, 0.0, 2.0], [9.0, 0.0, 0.0, 9.0], None) == [True, False, False, True]


def test_a_choice_is_expected_to_reach_its_aim() -> None:
    noise = Noise(signal=[100.0, 100.0], base=[0.01, 0.01], noises=[[1.0, 1.0], [0.1, 0.1], [0.02, 0.02]])
    assert noise.choose([5.0, 1.0, 1.0], None) == [True, True, True]
    assert noise.choose([5.0, 1.0, 1.0], 25.0) == [False, True, True]
    assert noise.choose([5.0, 1.0, -1.0], 25.0) == [False, True, False]
    assert noise.choose([5.0, 1.0, 1.0], 60.0) == [False, False, False]
    assert noise.alone_db(1) == pytest.approx(30.0)


def test_times_of_kernels_are_shared_out_by_multiplications() -> None:
    kernels = [
        Kernel("a", ("q", "k"), "FullyConnected", "int8", "gemm", 4.0),
        Kernel("b", ("conv", "act"), "Convolution", "int8", "brgconv", 1.0),
        Kernel("c", ("act/q",), "FakeQuantize", "f32", "jit", 0.5),
        Kernel("d", ("norm", "act/q"), "Subgraph", "f32", "jit", 8.0),
    ]
    assert times_by_product(kernels, {"q": 100, "k": 300, "conv": 7}) == {"q": 1.0, "k": 3.0, "conv": 1.0}
    switches = [placement.switches.Switch("act/q", ("act/q", "act/dq"), ("conv",))]
    assert quantizing_times(kernels, switches) == [0.5]
    again = [Kernel("a", ("q", "k"), "FullyConnected", "int8", "gemm", ms) for ms in (4.0, 3.0, 5.0)]
    assert least(again).ms == 3.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_RACE_SECONDS", "_FAMILY_SECONDS"):
        monkeypatch.setattr(place, name, 0.05)


def optimized(bundle: Artifact, output: Path, **options: object) -> Artifact:
    return build_engine(bundle, output, threads=1, optimize_for="latency", precision="f32", **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_the_engine_is_one_of_those_measured_and_not_slower_than_16_bits(
    quantized_bundle: Artifact, tmp_path: Path
) -> None:
    engine = optimized(quantized_bundle, tmp_path / "engine")
    found = engine.measured.placement
    ms = {name: candidate.ms for name, candidate in found.engines.items()}
    assert {place.ALL, place.NONE} <= ms.keys()
    assert ms[found.taken] <= (1 + place.SAME) * min(ms.values())
    decided = {decision.quantizer: decision.int8 for decision in found.decisions}
    assert set(decided) == {"act_conv/q", "act_linear/q"}
    assert engine.facts.quantizers_left_out == [name for name, int8 in decided.items() if not int8]
    assert all(decision.why and decision.macs > 0 for decision in found.decisions)
    assert not (engine.path.parent / ".engine.work").exists()


@pytest.mark.usefixtures("quick")
def test_a_least_sqnr_is_kept(
    quantized_bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where int8 saves time everywhere but only some of it is exact enough, that part is kept."""
    monkeypatch.setattr(place.Placer, "time_saved", lambda self, every, switches, members: 1.0)
    inputs, reference, simulated = read_probe(quantized_bundle.path)
    assert simulated is not None
    by_gates = {
        gates: median(sqnr_by_row(run(with_gates(model(), find_switches(model())), list(gates)), reference))
        for gates in product([False, True], repeat=2)
    }
    both, one = by_gates[True, True], max(by_gates[True, False], by_gates[False, True])
    least_sqnr = (both + one) / 2
    engine = optimized(quantized_bundle, tmp_path / "engine", min_sqnr=least_sqnr)
    assert engine.facts.quantizers_left_out
    with load_engine(engine) as loaded:
        assert median(sqnr_by_row(row_by_row(loaded, inputs), reference)) >= least_sqnr
        int8 = {
            name
            for kernel in loaded.kernels(example_inputs(1))
            if kernel.precision == "int8"
            for name in kernel.layers
        }
    for decision in engine.measured.placement.decisions:
        assert decision.int8 == int8.issuperset(decision.products)


@pytest.mark.usefixtures("quick")
def test_an_sqnr_out_of_reach_is_told(quantized_bundle: Artifact, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"reaches 90 dB: with all activations in f32 it is \d\d\.\d dB"):
        optimized(quantized_bundle, tmp_path / "engine", min_sqnr=90)
    assert not (tmp_path / "engine").exists()


@pytest.mark.usefixtures("quick")
def test_a_stopped_search_goes_on(
    quantized_bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place.Placer, "compare_latency", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimized(quantized_bundle, tmp_path / "engine")
    computed: list[str] = []
    saved = place.Placer.time_saved
    monkeypatch.setattr(place.Placer, "time_saved", lambda *a: computed.append("family") or saved(*a))
    optimized(quantized_bundle, tmp_path / "engine")
    assert computed == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_sqnr": 30.0}, "set both"),
        ({"optimize_for": "size"}, "for latency, not for 'size'"),
        ({"optimize_for": "latency", "min_sqnr": float("nan")}, "a number of dB"),
    ],
)
def test_goals_that_make_no_sense(
    quantized_bundle: Artifact, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(quantized_bundle, tmp_path / "engine", **options)  # type: ignore[arg-type]


def test_a_graph_without_quantizers_has_nothing_to_place(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "float", quantized=False)
    with pytest.raises(QDeployError, match="has none"):
        optimized(bundle, tmp_path / "engine")
