"""Rounding in closed form: codes of least quadratic error, given the second moments of a layer's inputs.

A layer computes ``W x``. With ``H = E[x x^T]``, the mean squared error of an output channel with weights w, whose
values on the grid are q, is ``(q - w) H (q - w)^T``. `gptq` rounds column after column and lets the columns to come
make up for the error (GPTQ, Frantar et al., ICLR 2023, arXiv 2210.17323, algorithm 1; OBQ, Frantar and Alistarh,
NeurIPS 2022, arXiv 2208.11580, equation 4), all channels at once, since none depends on another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.quant.operators import to_grid
from qdeploy.recipe.formats import Format

_BLOCK = 128  # columns whose effect on later ones is applied at once


@dataclass(frozen=True)
class Grid:
    """The grid that weights [O, K] are rounded to.

    Attributes:
        scale: [O, K] positive steps.
        zero_point: codes of zero, shaped like ``scale``.
        number_format: says which codes there are.
    """

    scale: Tensor
    zero_point: Tensor
    number_format: Format

    def values(self, weight: Tensor) -> Tensor:
        """The values on the grid that are nearest to a weight's."""
        return to_grid(weight, self.scale, self.zero_point, self.number_format)

    def codes(self, values: Tensor) -> Tensor:
        """The codes of values on the grid."""
        codes = values / self.scale + self.zero_point
        codes = codes if self.number_format.floating else codes.round()
        return codes.clamp(self.number_format.qmin, self.number_format.qmax)


@dataclass(frozen=True)
class Rounded:
    """Rows of a weight on the grid.

    Attributes:
        values: [O, K].
        error: their quadratic error, summed up.
        nearest_error: that of rounding to nearest.
    """

    values: Tensor
    error: float
    nearest_error: float


def quadratic_error(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """[O] ``(q - w) H (q - w)^T`` of each row, in double precision.

    Args:
        weight: [O, K].
        values: [O, K] what stands in its place.
        hessian: [K, K].
    """
    error = (values - weight).double()
    return ((error @ hessian.double()) * error).sum(1)


def round_rows(
    weight: Tensor, grid: Grid, hessian: Tensor, damping: float, aim: Tensor | None = None
) -> Rounded:
    """Values on the grid whose quadratic error is, row by row, at most that of the weight rounded to nearest.

    Args:
        weight: [O, K] float.
        grid: for it.
        hessian: [K, K] second moments of the inputs.
        damping: share of the mean of the diagonal that is added to it for `gptq` (section 3.3, step 3).
        aim: [O, K] what the values are to come close to; the weight itself by default.

    """
    nearest, aim = grid.values(weight), weight if aim is None else aim
    found = gptq(aim, grid, hessian, damping)
    error, nearest_error = (quadratic_error(aim, values, hessian) for values in (found, nearest))
    better = error < nearest_error
    values = torch.where(better[:, None], found, nearest)
    return Rounded(values, float(torch.where(better, error, nearest_error).sum()), float(nearest_error.sum()))


def made_up_for(weight: Tensor, hessian: Tensor, missed: Tensor, damping: float) -> Tensor:
    """The weight that computes from inputs x most nearly what ``weight`` computes from others, x'.

    Least mean of ``|W* x - W x'|^2``: ``W* = W + W E[(x' - x) x^T] H^-1``, H damped as in `gptq`.

    Args:
        weight: [O, K] W.
        hessian: [K, K] second moments H of x.
        missed: [O, K] ``W E[(x' - x) x^T]``.
        damping: share of the mean of the diagonal that is added to H.
    """
    lower = _damped_factor(hessian, damping)
    return weight + torch.cholesky_solve(missed.T, lower).T


def gptq(weight: Tensor, grid: Grid, hessian: Tensor, damping: float) -> Tensor:
    """Round column after column, the largest second moments first; arguments as for `round_rows`.

    Columns whose inputs are always 0 are rounded to nearest.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_factor(hessian[order[:, None], order], damping)
    # [K, O], since a column is read and written as a whole.
    left, scale, zero = (each.T[order] for each in (weight, grid.scale, grid.zero_point))
    rounded = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for column, error in enumerate(errors, start):
            rounded[column] = to_grid(left[column], scale[column], zero[column], grid.number_format)
            torch.div(left[column] - rounded[column], inverse[column, column], out=error)
            left[column:stop] -= torch.outer(inverse[column, column:stop], error)
        left[stop:] -= inverse[start:stop, stop:].T @ errors
    found = torch.empty_like(weight)
    found[:, order] = rounded.T
    return found


def _damped(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    damped = hessian.clone()
    damped.diagonal().add_(torch.where(diagonal > 0, damping * mean, mean))
    return damped


def _damped_factor(hessian: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of a damped Hessian; more damping where that fails."""
    lower: Tensor
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping))
        if not failed:
            return lower
        damping = max(10 * damping, 1e-6)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse (section 3.3, step 3); more damping where that fails."""
    upper: Tensor
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower  # of the largest layers each of these takes gigabytes
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)
