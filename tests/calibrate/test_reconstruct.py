"""Reconstruction sees the right inputs, in the right order, all of them, and within its memory budget."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.reconstruct import optimize, output_error
from qdeploy.calibrate.record_units import UnitRecorder
from qdeploy.calibrate.recorded_rows import RecordedRows
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import full_precision
from qdeploy.recipe.formats import int4, int8
from tests.helpers import MemoryRows, calibrating, layer_problem, minmax_layer, same_tree, tiny_unet

RESNET = "up_blocks.0.resnets.0"
ATTENTION = "mid_block.attentions.0"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A quantized network with min-max ranges; 26 of 64 rows, in batches of 5."""
    with calibrating(tiny_unet(), MemoryRows.noisy(), tmp_path / "checkpoint") as session:
        minmax.WeightRanges().run(session)
        minmax.ActivationRanges().run(session)
        yield session


def recorder(session: Session, rows: list[int] | None = None, budget: int = 2**30) -> UnitRecorder:
    rows = session.rows() if rows is None else rows
    return UnitRecorder(session.denoiser, session.inputs, rows, 5, session.draft.work / "scratch", budget)


def live_inputs(session: Session, unit: str, rows: list[int]) -> tuple[Any, Any]:
    """What a unit is called with while the whole network runs on ``rows``."""
    seen: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    handle = session.denoiser.get_submodule(unit).register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        denoise(session.denoiser, session.inputs(rows))
    handle.remove()
    args, kwargs = seen[0]
    return args, kwargs


# -- recording ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [RESNET, ATTENTION])
def test_recorded_inputs_are_those_of_the_quantized_network_at_that_point(
    session: Session, unit: str
) -> None:
    """Units before it are quantized, and the batch is as it was (QD-11: not the float network's inputs)."""
    rows = session.rows()
    recorded = recorder(session).inputs(unit)
    for start in range(0, len(rows), 5):
        chosen = torch.arange(start, min(start + 5, len(rows)))
        assert same_tree(recorded.batch(chosen), live_inputs(session, unit, rows[start : start + 5]))
    with full_precision(session.denoiser):
        assert not same_tree(recorded.batch(torch.arange(5)), live_inputs(session, unit, rows[:5]))


def test_targets_are_those_of_the_full_precision_network(session: Session) -> None:
    untouched = tiny_unet()
    seen: list[Tensor] = []
    untouched.get_submodule(RESNET).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        denoise(untouched, session.inputs(session.rows()[:5]))
    targets = UnitWalk(session).problem(RESNET).targets
    assert torch.equal(targets.batch(torch.arange(5)), seen[0])


@pytest.mark.parametrize("rows", [1, 4, 5, 13])
def test_no_row_is_dropped_where_the_batch_does_not_divide_them(session: Session, rows: int) -> None:
    """QD-10: the released code drops the rows of the last, smaller batch."""
    chosen = session.rows()[:rows]
    outputs = recorder(session, chosen).outputs(RESNET)
    assert [len(tensor) for tensor in outputs.tensors] == [rows]
    last = recorder(session, chosen[-1:]).outputs(RESNET)
    assert torch.allclose(outputs.tensors[0][-1], last.tensors[0][0], atol=1e-4)


class Rotated(nn.Module):
    """A denoiser whose block gets a table of five positions, as rotary embeddings are passed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.block(sample.flatten(2), table=torch.arange(5.0)[:, None].expand(5, 3)),)


class Block(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x[..., :5] + table.T


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_a_table_that_happens_to_be_as_long_as_the_batch_is_no_row_data(tmp_path: Path, rows: int) -> None:
    network, data = Rotated().eval(), MemoryRows.noisy()
    recorded = UnitRecorder(network, data.inputs, list(range(rows)), 5, tmp_path, 2**30).inputs("block")
    _, kwargs = recorded.batch(torch.arange(rows).flip(0))
    assert torch.equal(kwargs["table"], torch.arange(5.0)[:, None].expand(5, 3))
    assert [len(tensor) for tensor in recorded.tensors] == [rows]


def test_rows_come_back_in_the_order_asked_for(session: Session) -> None:
    rows = recorder(session).inputs(RESNET)
    (forward, _), _ = rows.batch(torch.tensor([0, 7, 25]))
    (backward, _), _ = rows.batch(torch.tensor([25, 7, 0]))
    assert torch.equal(forward, backward.flip(0))


def test_dropout_is_off_while_recording(session: Session) -> None:
    """QD-2: the released code leaves the network in training mode; its dropout of 0.1 is active."""
    first, second = (recorder(session).outputs(RESNET).tensors for _ in range(2))
    assert same_tree(first, second)
    session.denoiser.train()
    with pytest.raises(AssertionError, match="dropout"):
        recorder(session).outputs(RESNET)


def test_no_hook_is_left_behind(session: Session) -> None:
    walk = UnitWalk(session)
    for unit in (RESNET, ATTENTION):
        walk.problem(unit)
    assert all("forward" not in module.__dict__ for module in session.denoiser.modules())
    module = session.denoiser.get_submodule(RESNET)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


# -- memory ------------------------------------------------------------------------------------------------


def test_what_exceeds_the_budget_goes_to_a_mapped_file_and_is_the_same(session: Session) -> None:
    in_memory = recorder(session).inputs(RESNET)
    size = sum(tensor.nbytes for tensor in in_memory.tensors)
    for budget, mapped in ((size, False), (size - 1, True), (0, True)):
        rows = recorder(session, budget=budget).inputs(RESNET)
        assert rows.in_memory == (0 if mapped else size)
        assert same_tree(rows.tensors, in_memory.tensors)


def test_mapped_files_have_no_names_so_that_nothing_is_left_of_them(session: Session) -> None:
    """Not even after kill -9: the space is free once the process is gone."""
    rows = recorder(session, budget=0).inputs(RESNET)
    assert rows.in_memory == 0
    assert not list((session.draft.work / "scratch").iterdir())


def test_a_full_disk_is_an_error_before_it_is_written_to(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        recorder(session, budget=0).inputs(RESNET)


@pytest.mark.slow
@pytest.mark.parametrize("coverage", ["portable", "qdiffusion-paper"])
def test_attention_is_one_unit_whose_maps_are_never_recorded(tmp_path: Path, coverage: str) -> None:
    """QD-8: maps of [rows, heads, N, N] took 300 GB; a unit without parameters crashed the optimiser."""
    tokens = 16  # 4x4 pixels, and no other size in this network but channels
    with calibrating(
        tiny_unet((8, 24)), MemoryRows.noisy(), tmp_path / "checkpoint", coverage=coverage
    ) as session:
        for name, layers in session.units.items():
            recorded = recorder(session)
            for rows in (recorded.inputs(name), recorded.outputs(name)):
                assert rows.tensors
                for tensor in rows.tensors:
                    assert tensor.ndim <= 4
                    assert tensor.shape[-2:] != (tokens, tokens)
            assert any(layer.weight_quantizers for layer in session.quantized(layers))
        attentions = [unit for unit in session.units if "attentions" in unit]
        assert attentions == [path for path in session.structure.attentions if path in session.units]
        assert {len(session.units[unit]) for unit in attentions} == {4}  # q, k, v and out


# -- the error ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_images_and_tokens_weigh_the_same(p: float) -> None:
    """QD-9: axis 1 holds the channels of images, but the tokens of [rows, tokens, features]."""
    y, y_hat = torch.randn(2, 3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    images = output_error(y_hat, y, p)
    tokens = output_error(y_hat.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2), p)
    assert tokens == pytest.approx(float(images), rel=1e-6)
    assert images == pytest.approx(float((y - y_hat).abs().pow(p).mean() * 6), rel=1e-6)


def test_the_error_does_not_grow_with_rows_or_pixels() -> None:
    y, y_hat = torch.randn(2, 3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    once = output_error(y_hat, y, 2)
    assert output_error(y_hat.repeat(2, 1, 3, 3), y.repeat(2, 1, 3, 3), 2) == pytest.approx(
        float(once), rel=1e-6
    )


def test_every_floating_output_counts() -> None:
    y, count = torch.ones(2, 3), torch.tensor([1, 2])
    error = output_error(
        {"a": (y + 1,), "b": y, "n": count, "f": None}, {"a": (y,), "b": y, "n": count, "f": None}, 2
    )
    assert error == 3


# -- optimising --------------------------------------------------------------------------------------------


def test_only_what_is_given_is_learned_and_only_from_its_rows() -> None:
    x = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    inner = nn.Conv2d(4, 4, 1).requires_grad_(False)
    layer = minmax_layer(inner, x, int4, None)
    y = inner(x)
    y[8:] = torch.nan  # rows that must not be touched
    gain = nn.Parameter(torch.zeros(()))
    layer.register_forward_hook(lambda module, args, output: output * (1 + gain))
    problem = layer_problem(layer, x, 1.5 * y, learn=8)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimize(problem, [gain], 200, 4, 0.05, torch.Generator().manual_seed(0), 2)
    assert float(gain) == pytest.approx(0.5, abs=0.05)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_rows_are_drawn_by_the_generator_alone() -> None:
    drawn = []

    class Spy(RecordedRows):
        def batch(self, rows: Tensor) -> Any:
            drawn[-1].append(rows.tolist())
            return super().batch(rows)

    x = torch.randn(12, 4, 3, 3)
    layer = minmax_layer(nn.Conv2d(4, 4, 1), x, int8, None)
    for seed in (1, 1, 2):
        drawn.append([])
        problem = layer_problem(layer, x, x, learn=9)
        problem.run.inputs = Spy(
            problem.run.inputs.tensors, problem.run.inputs.entries, problem.run.inputs.build
        )
        torch.manual_seed(len(drawn))  # global randomness is none of its business
        optimize(problem, [nn.Parameter(torch.zeros(1))], 0, 4, 0.1, torch.Generator().manual_seed(seed), 2)
        free = nn.Parameter(torch.zeros(()))
        layer.register_forward_hook(lambda module, args, output, free=free: output + free)
        optimize(problem, [free], 5, 4, 0.1, torch.Generator().manual_seed(seed), 2)
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(row < 9 for rows in drawn[0] for row in rows)
    assert all(len(rows) == 4 for rows in drawn[0])


def test_held_out_rows_come_from_other_images(session: Session) -> None:
    """RecordedRows of one trajectory are alike: judging by them would be judging by what was learned."""
    rows = session.rows()
    learn, judge = session.split(rows)
    images = session.data.images[rows]
    assert sorted([*learn.tolist(), *judge.tolist()]) == list(range(len(rows)))
    assert not set(images[learn].tolist()) & set(images[judge].tolist())
    assert len(learn) > len(judge) > 0


@pytest.mark.parametrize("rows", [1, 2, 8, 20])
def test_there_is_something_to_judge_by_even_with_one_image(session: Session, rows: int) -> None:
    session.data.images = torch.zeros(rows, dtype=torch.int64)
    learn, judge = session.split(range(rows))
    assert len(learn) > 0
    assert len(judge) > 0


def test_judging_covers_each_held_out_row_once(session: Session) -> None:
    x = torch.randn(13, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    layer: QuantizedLayer = minmax_layer(nn.Conv2d(4, 4, 1), x, int4, None)
    problem = layer_problem(layer, x, torch.zeros_like(x), learn=3)
    with torch.no_grad():
        expected = output_error(layer(x[3:]), torch.zeros(10, 4, 3, 3), 2)
    for batch in (1, 3, 32):
        assert problem.judged(2, batch) == pytest.approx(float(expected), rel=1e-5)
