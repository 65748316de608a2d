"""Rounding in closed form, against slow searches that follow the papers' formulas directly."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdeploy.calibrate.quadratic import Grid, gptq, made_up_for, quadratic_error, round_rows
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import Format, int4, int8, uint4

DAMPING = 0.01
crumbs = Format("int2", bits=2, symmetric=True)
seeds = st.integers(0, 10_000)
all_formats = pytest.mark.parametrize("number_format", [int4, uint4, int8], ids=lambda f: f.name)


def random_case(
    seed: int, number_format: Format, rows: int = 4, columns: int = 7
) -> tuple[Tensor, Grid, Tensor]:
    """A weight, a grid that clips some of it, and the moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scale, zero = minmax_weights(weight, number_format)
    steps, origin = (values[:, None].expand_as(weight).float() for values in (0.9 * scale, zero))
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(64, columns, generator=generator) @ mixing
    return weight, Grid(steps, origin, number_format), x.T @ x / len(x)


def obq_of_a_row(weight: Tensor, grid: Grid, hessian: Tensor, damping: float) -> Tensor:
    """Equation 4 of OBQ, one weight after the other in the order of GPTQ, the inverse made anew at every step."""
    left, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    free = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    while free:
        inverse = torch.linalg.inv(damped[free][:, free])
        column = free[0]
        found[:, column] = grid.values(left.float())[:, column].double()
        error = (left[:, column] - found[:, column]) / inverse[0, 0]
        left[:, free] -= torch.outer(error, inverse[0])
        free = free[1:]
    return found.float()


@all_formats
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_gptq_is_obq_in_a_fixed_order(number_format: Format, seed: int) -> None:
    weight, grid, hessian = random_case(seed, number_format)
    ours, slow = gptq(weight, grid, hessian, DAMPING), obq_of_a_row(weight, grid, hessian, DAMPING)
    # A weight halfway between two codes may fall to either side, and those behind it with it.
    alike = ((ours - slow).abs() < 1e-4 * grid.scale).all(1)
    assert alike.float().mean() >= 0.75


def test_gptq_is_obq_across_blocks_of_columns() -> None:
    weight, grid, hessian = random_case(3, int4, rows=3, columns=150)
    hessian = hessian + hessian.diagonal().mean() * torch.eye(150)  # well conditioned: no knife's edges
    ours, slow = gptq(weight, grid, hessian, DAMPING), obq_of_a_row(weight, grid, hessian, DAMPING)
    assert ((ours - slow).abs() < 1e-4 * grid.scale).all()


def test_few_of_all_choices_are_better_than_what_is_found() -> None:
    """Brute force over all 4^6 rows of four values, for 40 rows."""
    every = torch.tensor(list(itertools.product(range(crumbs.qmin, crumbs.qmax + 1), repeat=6))).float()
    ranks: dict[str, list[float]] = {"found": [], "nearest": []}
    for seed in range(10):
        weight, grid, hessian = random_case(seed, crumbs, columns=6)
        chosen = {"found": round_rows(weight, grid, hessian, DAMPING).values, "nearest": grid.values(weight)}
        for row in range(len(weight)):
            values = every * grid.scale[row]
            errors = quadratic_error(weight[row].expand_as(values), values, hessian)
            for name, tensors in chosen.items():
                own = quadratic_error(weight[row : row + 1], tensors[row : row + 1], hessian)
                ranks[name].append(float((errors < own * (1 - 1e-5)).float().mean()))
    assert sum(ranks["found"]) / 40 < 0.005
    assert sum(ranks["found"]) < 0.5 * sum(ranks["nearest"])


@all_formats
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_no_row_is_worse_than_rounded_to_nearest(number_format: Format, seed: int) -> None:
    weight, grid, hessian = random_case(seed, number_format, columns=40)  # as many as half of the vectors
    found = round_rows(weight, grid, hessian, DAMPING).values
    nearest = quadratic_error(weight, grid.values(weight), hessian)
    assert torch.all(quadratic_error(weight, found, hessian) <= nearest)
    codes = grid.codes(found)
    assert codes.min() >= number_format.qmin
    assert codes.max() <= number_format.qmax
    assert torch.allclose((codes - grid.zero_point) * grid.scale, found, atol=1e-6)


def test_correlated_inputs_are_worth_half_of_the_error() -> None:
    weight, grid, hessian = random_case(0, int4, rows=32, columns=60)
    nearest = quadratic_error(weight, grid.values(weight), hessian).sum()
    assert quadratic_error(weight, gptq(weight, grid, hessian, DAMPING), hessian).sum() < 0.5 * nearest


@all_formats
def test_weights_on_the_grid_stay_what_they_are(number_format: Format) -> None:
    weight, grid, hessian = random_case(1, number_format, columns=30)
    weight = grid.values(weight)
    assert torch.equal(grid.codes(round_rows(weight, grid, hessian, DAMPING).values), grid.codes(weight))


def test_inputs_that_do_not_correlate_leave_nothing_but_nearest() -> None:
    weight, grid, _ = random_case(2, int4, columns=30)
    hessian = torch.diag(torch.rand(30) + 0.1)
    assert torch.equal(round_rows(weight, grid, hessian, DAMPING).values, grid.values(weight))


def test_silent_columns_are_rounded_to_nearest_and_singular_moments_are_no_obstacle() -> None:
    weight, grid, hessian = random_case(4, int4, columns=30)
    hessian[:, 5] = hessian[5] = 0
    hessian[:, 7], hessian[7] = hessian[:, 6], hessian[6]  # the same input twice
    hessian[7, 7] = hessian[6, 6]
    found = round_rows(weight, grid, hessian, 1e-12).values
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 5], grid.values(weight)[:, 5])
    assert torch.equal(round_rows(weight, grid, torch.zeros(30, 30), DAMPING).values, grid.values(weight))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_what_makes_up_for_inputs_that_are_off_is_the_least_squares_solution(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, wanted = torch.randn(4, 7, generator=generator), torch.randn(64, 7, generator=generator)
    x = wanted @ torch.randn(7, 7, generator=generator) + torch.randn(64, 7, generator=generator)
    moments, missed = x.T @ x / 64, weight @ (wanted - x).T @ x / 64
    found = made_up_for(weight, moments, missed, 1e-7)
    expected = torch.linalg.lstsq(x.double(), (wanted @ weight.T).double(), driver="gelsd").solution.T
    assert torch.allclose(found.double(), expected, atol=1e-2)
    damped = made_up_for(weight, moments, missed, 1e6)
    assert torch.allclose(damped, weight, atol=1e-3)  # it asks for more than can be trusted
