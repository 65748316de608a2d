"""A walk over the units gives each what the whole network gives it, and runs none of them twice."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate import finished_units
from qdeploy.calibrate.finished_units import FinishedUnits
from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.record_units import UnitRecorder
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.network.readers import END, readers_of
from tests.helpers import MemoryRows, calibrating, same_tree
from tests.models import FAMILIES, make

ROWS = 23  # the last batch is smaller


@pytest.fixture(params=FAMILIES)
def session(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    """A network whose weights and activations have ranges, and no weight a code."""
    denoiser, inputs = make(request.param)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, value in inputs.items():
        rows = value.expand(1, *value.shape[1:]) if value.ndim else value[None]
        rows = rows.repeat(ROWS, *[1] * (rows.ndim - 1))
        noise = torch.randn(rows.shape, generator=generator) if rows.is_floating_point() else 0
        tensors[name] = rows + noise
    tensors["timestep"] = torch.linspace(980, 20, ROWS).long()
    data = MemoryRows(tensors, torch.arange(ROWS))
    with calibrating(denoiser, data, tmp_path / "checkpoint", weights="int4") as session:
        minmax.WeightRanges().run(session)
        minmax.ActivationRanges().run(session)
        yield session


def fresh(session: Session) -> UnitRecorder:
    """What runs the network from its start each time."""
    scratch = session.draft.work / "scratch"
    return UnitRecorder(session.denoiser, session.inputs, session.rows(), session.batch, scratch, 2**30)


def change(session: Session, unit: str) -> None:
    """Do to a unit what a stage does, roughly: its weights are codes then, and not the nearest."""
    for layer in session.quantized(session.units[unit]):
        minmax.round_to_nearest(layer)
        for quantizer, _ in layer.weight_pairs():
            assert quantizer.codes is not None
            quantizer.codes = (quantizer.codes + 1).clamp(max=quantizer.format.qmax)


def walked(session: Session) -> UnitWalk:
    """A walk in which each unit gets what a run of the whole network gives it, and then changes."""
    rows = torch.arange(len(session.rows()))
    walk = UnitWalk(session)
    for unit in session.units:
        assert same_tree(walk.run(unit).inputs.batch(rows), fresh(session).inputs(unit).batch(rows))
        change(session, unit)
    return walk


@pytest.mark.parametrize("memory", [2**30, 0])
def test_each_unit_is_given_what_the_whole_network_gives_it(session: Session, memory: int) -> None:
    session.max_memory = memory
    rows = torch.arange(len(session.rows()))
    walk = UnitWalk(session)
    for unit in session.units:
        problem = walk.problem(unit)
        assert same_tree(problem.run.inputs.batch(rows), fresh(session).inputs(unit).batch(rows))
        with session.teacher():
            assert same_tree(problem.targets.batch(rows), fresh(session).outputs(unit).batch(rows))
        change(session, unit)


def test_each_unit_runs_once_over_all_rows(session: Session) -> None:
    calls: Counter[str] = Counter()

    def before(call: ModuleCall) -> None:
        calls[call.name] += 1

    walk = UnitWalk(session)
    watched = {layer.path: session.denoiser.get_submodule(layer.path) for layer in session.layers}
    once = {path for path, layers in session.structure.units.items() if len(layers) > 1}
    with observing(watched, before):
        for unit in session.units:
            walk.run(unit)
    batches = -(-len(session.rows()) // session.batch)
    inside = [calls[layer.path] for layer in session.layers if layer.unit in once]
    assert inside
    assert max(inside) <= batches + 2  # the few rows before, and the row that finds who reads what


def test_without_room_a_unit_runs_again_and_nothing_else_changes(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_units, "disk_usage", lambda path: SimpleNamespace(free=0))
    session.max_memory = 0
    finished = walked(session)._recorders["student"].finished
    assert finished is not None
    assert not finished.kept


def test_room_that_comes_and_goes_decides_for_all_rows_of_a_unit(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began without room, on the few rows before the others, is not kept from some batch on."""
    free = itertools.cycle([0, 0, 2**40, 0, 2**40])
    monkeypatch.setattr(finished_units, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    session.max_memory = 0
    walked(session)


def test_a_unit_that_is_asked_for_again_is_found_anew(session: Session) -> None:
    rows = torch.arange(len(session.rows()))
    readers = session.readers
    first, second = next(
        (unit, reader) for unit in session.units for reader in session.units if reader in readers[unit]
    )
    walk = UnitWalk(session)
    before = walk.run(second).inputs.batch(rows)
    walk.run(list(session.units)[-1])
    change(session, first)
    again = walk.run(second).inputs.batch(rows)
    assert same_tree(again, fresh(session).inputs(second).batch(rows))
    assert not same_tree(again, before)


# -- what is kept ------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """Four parts: the second and the last read the first, and the last is called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        a = self.a(sample)
        c = self.c(self.b(a).relu()) + a
        return (self.d(self.d(c)),)


def shortcut() -> tuple[Shortcut, dict[str, nn.Module]]:
    network = Shortcut().eval()
    return network, dict(network.named_children())


def test_who_reads_what_is_found_by_running() -> None:
    network, parts = shortcut()
    found = readers_of(network, parts, {"sample": torch.randn(1, 4), "timestep": torch.ones(1)})
    # d is called twice, and so never replaced: what it reads goes on to the end.
    assert found == {"a": {"b", "d", END}, "b": {"c"}, "c": {"d", END}}
    parts.pop("d")
    found = readers_of(network, parts, {"sample": torch.randn(1, 4), "timestep": torch.ones(1)})
    assert found == {"a": {"b", END}, "b": {"c"}, "c": {END}}
    assert all("forward" not in module.__dict__ for module in network.modules())


def test_what_no_unit_to_come_reads_is_dropped_and_is_nan_if_it_is_read_after_all(tmp_path: Path) -> None:
    network, parts = shortcut()
    inputs = {"sample": torch.randn(9, 4), "timestep": torch.ones(9)}
    readers = readers_of(network, parts, {name: value[:1] for name, value in inputs.items()})
    known = {path: parts[path] for path in readers}
    finished = FinishedUnits(known, readers, 9, tmp_path, 2**20)

    def load(rows: Any) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in inputs.items()}

    recorder = UnitRecorder(network, load, list(range(9)), 4, tmp_path, 2**20, finished)
    recorder.inputs("c")
    assert (set(finished.kept), set(finished.unread)) == ({"a", "b"}, set())
    recorder.inputs("d")
    assert (set(finished.kept), set(finished.unread)) == ({"a", "c"}, {"b"})
    with finished.passing("d", torch.arange(3)):
        assert network.b(torch.zeros(3, 4)).isnan().all()
        assert torch.equal(network.a(torch.zeros(3, 4)), finished.kept["a"].tensors[0][:3])


class Film(nn.Module):
    """A denoiser whose block sees the frames of all rows as rows, as those of films do."""

    FRAMES = 3

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        frames = self.first(sample.flatten(0, 1))
        return (self.last(self.block(frames)).unflatten(0, sample.shape[:2]),)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_several_frames_of_each_row_belong_to_the_row(tmp_path: Path, batch: int) -> None:
    network = Film().eval()
    inputs = {"sample": torch.randn(7, Film.FRAMES, 4), "timestep": torch.ones(7)}

    def load(rows: Any) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in inputs.items()}

    recorded = UnitRecorder(network, load, list(range(7)), batch, tmp_path, 2**20).inputs("last")
    chosen = torch.tensor([5, 0])
    (found,), _ = recorded.batch(chosen)
    with torch.no_grad():
        expected = network.block(network.first(inputs["sample"][chosen].flatten(0, 1)))
    assert torch.allclose(found, expected, atol=1e-6)
