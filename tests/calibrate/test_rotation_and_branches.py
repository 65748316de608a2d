"""Stages rotate and low-rank: exact in float, and worth something in four bits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.rotation import Rotate, rotation_size
from qdeploy.calibrate.methods.smoothquant import MigrateOutliers
from qdeploy.calibrate.methods.svdquant import LowRank, spend, split_off
from qdeploy.model.inputs import denoise
from qdeploy.quant.basis import hadamard
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.quant.state import code_shapes, read_state, write_state
from qdeploy.recipe.formats import int4
from qdeploy.recipe.stages import Stage, check_stages
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, calibrating, dit_rows, sqnr_db, tiny_unet
from tests.models import tiny_dit

W4A4 = {"weights": "int4", "activations": "int4", "target": "simulated"}
NETWORKS = {
    "unet": (lambda: tiny_unet((16, 32)), MemoryRows.noisy),
    "dit": (tiny_dit, lambda: dit_rows(MemoryRows.noisy())),
}
STAGES: dict[str, list[Stage]] = {
    "rotate": [Rotate(16)],
    "low-rank": [LowRank(4)],
    "both": [MigrateOutliers(), LowRank(4), Rotate(16)],
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("stages", STAGES)
def test_a_network_computes_in_float_what_it_did(network: str, stages: str, tmp_path: Path) -> None:
    """Of a DiT too, whose norms are modulated: the rotation stands behind the modulation."""
    make, rows = NETWORKS[network]
    denoiser, data = make(), rows()
    expected = denoise(denoiser, data.inputs(range(6)))
    with calibrating(denoiser, data, tmp_path / "x", **W4A4) as session:
        for stage in STAGES[stages]:
            stage.run(session)
        layers = quantized_layers(denoiser).values()
        changed = [layer for layer in layers if layer.rotation is not None or layer.branch_up is not None]
        assert len(changed) > len(layers) / 4
        for layer in layers:
            layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()
        assert sqnr_db(expected, denoise(denoiser, data.inputs(range(6)))) > 100


def test_four_bits_hold_a_rotated_input_and_a_branch_better() -> None:
    """With outliers planted in a few channels of the input, and in a direction of the weight."""
    generator = torch.Generator().manual_seed(2)
    inner = nn.Linear(128, 96).requires_grad_(False)
    inner.weight += (
        torch.outer(torch.randn(96, generator=generator), torch.randn(128, generator=generator)) / 4
    )
    x = torch.randn(400, 128, generator=generator)
    x[:, ::37] *= 30
    found = {}
    for name in ("plain", "rotated", "branch", "both"):
        layer = QuantizedLayer(inner, int4, int4)
        if name in ("branch", "both"):
            split_off(layer, 4)
        if name in ("rotated", "both"):
            layer.rotation = hadamard(32)
        for quantizer, weight in layer.weight_pairs():
            quantizer.set(*minmax_weights(weight, int4))
        (part,) = layer.input_parts(x)
        layer.activation_quantizers[0].set(*to_scale(part.min(), part.max(), int4))
        found[name] = sqnr_db(inner(x), layer(x))
    assert found["rotated"] > found["plain"] + 1
    assert found["branch"] > found["plain"] + 2
    assert found["both"] > max(found["rotated"], found["branch"]) + 1


def test_layers_that_read_one_tensor_are_rotated_alike(tmp_path: Path) -> None:
    denoiser, data = tiny_dit(), dit_rows(MemoryRows.noisy())
    with calibrating(denoiser, data, tmp_path / "x", **W4A4) as session:
        Rotate(64).run(session)
        for layer in session.layers:
            first, own = (quantized_layers(denoiser)[path].rotation for path in (layer.reads, layer.path))
            assert (first is None) == (own is None)
            assert first is None or torch.equal(first, own)


def test_state_is_written_and_read_without_loss(tmp_path: Path) -> None:
    denoiser, data = tiny_dit(), dit_rows(MemoryRows.noisy())
    with calibrating(denoiser, data, tmp_path / "x", **W4A4) as session:
        for stage in (*STAGES["both"], WeightRanges(), ActivationRanges()):
            stage.run(session)
        state, shapes = read_state(denoiser), code_shapes(denoiser)
        expected = denoise(denoiser, data.inputs([0, 1]))
    fresh = tiny_dit()
    with calibrating(fresh, data, tmp_path / "y", **W4A4):
        write_state(fresh, state, shapes)
        assert torch.equal(expected, denoise(fresh, data.inputs([0, 1])))


@pytest.mark.parametrize(
    ("features", "split", "size", "found"),
    [(64, (), 32, 32), (96, (), 64, 32), (80, (), 64, 16), (63, (), 32, 1), (96, (64, 32), 64, 32)],
)
def test_a_rotation_never_crosses_the_parts_of_an_input(
    features: int, split: tuple[int, ...], size: int, found: int
) -> None:
    assert rotation_size(QuantizedLayer(nn.Linear(features, 8), None, None, split), size) == found


def test_the_branch_is_the_best_of_its_rank() -> None:
    """Eckart-Young: nothing of that rank leaves less, and the residual's energy is that of the other values."""
    inner = nn.Linear(32, 20).requires_grad_(False)
    layer = QuantizedLayer(inner, int4, None)
    layer.smoothing = torch.rand(32) + 0.5
    smoothed = inner.weight * layer.smoothing
    split_off(layer, 5)
    values = torch.linalg.svdvals(smoothed.double())
    assert float(layer.student.norm()) == pytest.approx(float(values[5:].norm()), rel=1e-4)


def test_ranks_are_spent_where_they_gain_most() -> None:
    gains = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([5.0, 3.0, 2.0])}
    costs = {"a": 2.0, "b": 1.0}
    for budget in range(1, 10):
        found = spend(gains, costs, budget)
        assert 2 * found["a"] + found["b"] <= budget
        value = {
            ranks: sum(float(gains[p][:r].sum()) for p, r in zip("ab", ranks, strict=True))
            for ranks in product(range(4), repeat=2)
            if 2 * ranks[0] + ranks[1] <= budget
        }
        # the best, up to one rank that did not fit any more
        assert max(value.values()) - value[found["a"], found["b"]] <= 4
    assert spend(gains, costs, 7) == {"a": 2, "b": 3}
    assert spend(gains, costs, 0.5) == {"a": 0, "b": 0}


def test_a_budget_gives_layers_different_ranks_within_it(tmp_path: Path) -> None:
    denoiser, data = tiny_dit(), dit_rows(MemoryRows.noisy())
    with calibrating(denoiser, data, tmp_path / "x", **W4A4) as session:
        LowRank(32, budget=0.1).run(session)
        layers = quantized_layers(denoiser)
        macs = {layer.path: layer.macs for layer in session.layers}
    ranks = {path: 0 if q.branch_up is None else len(q.branch_up) for path, q in layers.items()}
    added = sum(
        macs[path] * rank * (layers[path].channels + layers[path].features) / layers[path].weight.numel()
        for path, rank in ranks.items()
    )
    assert len(set(ranks.values())) > 1
    assert 0.05 * sum(macs.values()) < added <= 0.1 * sum(macs.values())


def test_a_rank_above_a_layers_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with (
        calibrating(tiny_dit(), dit_rows(MemoryRows.noisy()), tmp_path / "x", **W4A4) as session,
        pytest.raises(UsageError, match=r"rank 129 is too large for .*, whose rank is 128"),
    ):
        LowRank(129).run(session)


@pytest.mark.parametrize("size", [0, 4, 12, 48, -16])
def test_a_size_that_no_hadamard_matrix_has_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="a power of two of at least 8"):
        Rotate(size)


def test_impossible_branches_and_orders_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        LowRank(0)
    with pytest.raises(UsageError, match="a share from 0 to 1"):
        LowRank(8, budget=1.5)
    with pytest.raises(UsageError, match="changes what rotations were found for"):
        check_stages([Rotate(), MigrateOutliers()])
    with pytest.raises(UsageError, match="changes what low-rank branches were found for"):
        check_stages([LowRank(), MigrateOutliers()])
    with pytest.raises(UsageError, match="changes what weight scales were found for"):
        check_stages([WeightRanges(), Rotate()])
