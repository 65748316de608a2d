"""Lookups go by the timestep's value: the nearest entry, whoever asks and however often."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qdeploy.network.current_timestep import (
    CurrentTimestep,
    attach_current_timestep,
    current_timestep_of,
    midpoints,
)

VALUES = st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True).map(sorted)


class Net(nn.Module):
    """Returns the current timesteps while it runs."""

    def forward(self, sample: Tensor, timestep: Tensor | float, scale: float = 1.0) -> Tensor | None:
        current = current_timestep_of(self)
        assert current is not None
        if scale < 0:
            raise RuntimeError("broken")
        return current.now


def chosen(values: list[float], *timesteps: float) -> list[int]:
    current = CurrentTimestep()
    with current.at(torch.tensor(timesteps)):
        return current.index(midpoints(torch.tensor(values, dtype=torch.float32))).tolist()


# -- the nearest entry -------------------------------------------------------------------------------------


@given(VALUES, st.floats(-50, 1050, width=32))
def test_the_entry_is_the_nearest_one(values: list[int], timestep: float) -> None:
    (index,) = chosen([float(v) for v in values], timestep)
    gaps = [abs(value - timestep) for value in values]
    assert gaps[index] == pytest.approx(min(gaps), abs=1e-4)


def test_a_tie_goes_to_the_lower_entry() -> None:
    assert chosen([0, 10, 20], 5, 15) == [0, 1]
    assert chosen([0, 10, 20], 5.001, 15.001) == [1, 2]
    assert chosen([1, 2], 1.5) == [0]


def test_fractional_timesteps_have_entries_of_their_own() -> None:
    assert chosen([0.5, 0.75, 999.25], 0.6, 0.63, 500, 500.1, 999.24) == [0, 1, 1, 2, 2]


def test_every_entry_finds_itself_and_what_lies_outside_finds_the_ends() -> None:
    values = [float(v) for v in (1, 34, 67, 500, 999)]
    assert chosen(values, *values) == list(range(5))
    assert chosen(values, -3, 1e6) == [0, 4]


def test_one_entry_needs_no_edges() -> None:
    assert chosen([7.0], 0, 7, 999) == [0, 0, 0]


def test_rows_of_one_call_may_have_different_timesteps() -> None:
    assert chosen([0, 100, 200], 190, 3, 120) == [2, 0, 1]


def test_where_all_rows_are_known_to_be_alike_the_first_is_asked() -> None:
    """As in an engine's graph, whose timestep is a scalar: then the lookup is one row long."""
    current = CurrentTimestep()
    current.single = True
    with current.at(torch.tensor([200.0, 200.0, 200.0])):
        assert current.index(torch.tensor([50.0, 150.0])).tolist() == [2]


# -- who sets it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.tensor(5), [5.0]),
        (torch.tensor([5, 7]), [5.0, 7.0]),
        (5, [5.0]),
        (5.25, [5.25]),
        (torch.tensor([[5.5], [6.5]]), [5.5, 6.5]),
    ],
)
def test_the_networks_own_call_sets_it(given: Tensor | float, told: list[float]) -> None:
    """Diffusers pipelines pass scalars, integers and one per row, by position and by name."""
    net = Net()
    current = attach_current_timestep(net)
    sample = torch.zeros(2, 1)
    for now in (net(sample, given), net(sample, timestep=given), net(timestep=given, sample=sample)):
        assert now.dtype == torch.float32
        assert now.tolist() == told
        assert current.now is None


def test_it_is_unset_after_a_call_that_failed() -> None:
    net = Net()
    current = attach_current_timestep(net)
    with pytest.raises(RuntimeError):
        net(torch.zeros(1), 5, scale=-1.0)
    assert current.now is None
    with pytest.raises(AssertionError, match="nothing is running"):
        current.index(torch.zeros(0))


def test_at_gives_back_what_was_there_even_after_an_error() -> None:
    current = CurrentTimestep()
    with current.at(torch.tensor([1])):
        with contextlib.suppress(ValueError), current.at(torch.tensor([2, 3])):
            assert current.now is not None
            assert current.now.tolist() == [2.0, 3.0]
            raise ValueError
        assert current.now is not None
        assert current.now.tolist() == [1.0]
    assert current.now is None


def test_a_network_has_one_clock_and_copies_ask_the_same() -> None:
    net = Net()
    assert current_timestep_of(net) is None
    current = attach_current_timestep(net)
    assert attach_current_timestep(net) is current is current_timestep_of(net)
    assert copy.deepcopy(current) is current


def test_every_timestep_of_a_call_is_checked_before_anything_runs() -> None:
    net, asked = Net(), []
    current = attach_current_timestep(net)

    def check(timestep: float) -> None:
        asked.append(timestep)
        if timestep > 999:
            raise ValueError("out of range")

    current.check = check
    net(torch.zeros(3), torch.tensor([3, 7, 3]))
    assert asked == [3.0, 7.0]
    with pytest.raises(ValueError, match="out of range"):
        net(torch.zeros(2), torch.tensor([3, 1000]))


def test_who_names_the_same_edges_in_one_call_gets_the_same_tensor() -> None:
    current, edges = CurrentTimestep(), torch.tensor([5.0])
    with current.at(torch.tensor([3.0])):
        first = current.index(edges, (5.0,))
        assert current.index(edges.clone(), (5.0,)) is first
        assert current.index(torch.tensor([1.0]), (1.0,)).tolist() == [1]
        assert current.index(edges).tolist() == first.tolist() == [0]
        with current.at(torch.tensor([7.0])):
            assert current.index(edges, (5.0,)).tolist() == [1]
    with current.at(torch.tensor([8.0])):
        assert current.index(edges, (5.0,)).tolist() == [1]
