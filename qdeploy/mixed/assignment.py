"""The formats of all layers that do least harm within budgets: an integer linear program.

Every layer takes one of its pairs of formats. Harms of layers add, since their errors are independent to first
order; so the total harm is linear in the choices, and so are bytes and bit-operations. `scipy.optimize.milp`
(HiGHS) finds the optimum and proves it, to a relative gap of 0.01 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from qdeploy.mixed.budget import MACS, SIZE
from qdeploy.mixed.costs import Costs
from qdeploy.mixed.ranking import LayerHarm, harm_db, score
from qdeploy.recipe.formats import NONE, parse_format

_GAP = 1e-4
_TOLERANCE = 3e-6  # above that of the solver's constraints


@dataclass(frozen=True)
class Choice:
    """A pair of formats for a layer, and what it costs.

    Attributes:
        layer: number of the layer.
        weights: format of the weight.
        activations: format of the input, or ``none``.
        harm: the error that it causes in the prediction, from `qdeploy.mixed.ranking.score`.
        size: bytes.
        macs: bit-operations per sample.
    """

    layer: int
    weights: str
    activations: str
    harm: float
    size: int
    macs: int


@dataclass(frozen=True)
class Assignment:
    """Formats of all layers.

    Attributes:
        formats: weights and activations by path.
        harm: the sum over layers.
        size: bytes of the whole denoiser.
        macs: bit-operations per sample of the whole denoiser.
    """

    formats: Mapping[str, tuple[str, str]]
    harm: float
    size: int
    macs: int

    @property
    def sqnr_db(self) -> float:
        """The SQNR of the prediction that follows from the harms."""
        return harm_db(self.harm)

    def cost(self, name: str) -> int:
        """``size`` or ``macs``."""
        return self.size if name == SIZE else self.macs


class AssignmentProblem:
    """The choices of every layer.

    Args:
        layers: the layers' harms.
        costs: what formats cost.
        weights: weight formats to choose from.
        activations: formats of inputs to choose from, ``none`` among them where float is allowed.
    """

    def __init__(
        self, layers: Sequence[LayerHarm], costs: Costs, weights: Sequence[str], activations: Sequence[str]
    ) -> None:
        self.layers, self.costs = list(layers), costs
        self.choices = [
            _choice(number, layer, costs, *pair)
            for number, layer in enumerate(self.layers)
            for pair in product(weights, _inputs(layer, activations))
        ]

    def solve(self, bounds: Mapping[str, int], least: str = "harm") -> Assignment | None:
        """The assignment within bounds with the least harm or cost; None if no assignment meets them.

        Args:
            bounds: largest ``size`` and ``macs`` of the whole denoiser.
            least: ``harm``, ``size`` or ``macs``.
        """
        found = self._solve(bounds, least, 0.0)
        if found is not None and any(found.cost(name) > bound for name, bound in bounds.items()):
            found = self._solve(
                bounds, least, _TOLERANCE
            )  # the solver's tolerance admits a few bytes too many
        return found

    def _solve(self, bounds: Mapping[str, int], least: str, margin: float) -> Assignment | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        objective = np.array([getattr(choice, least) for choice in self.choices], dtype=float)
        rows, low = [list(part) for part in self._one_each]
        high = list(low)
        for name, bound in bounds.items():
            unit = max(1.0, float(bound))
            rows.append([getattr(choice, name) / unit for choice in self.choices])
            low.append(-np.inf)
            high.append((bound - self._fixed(name)) / unit - margin)
        found = milp(
            objective / max(float(objective.max()), 1e-300),
            constraints=LinearConstraint(np.array(rows), low, high),
            integrality=np.ones(len(self.choices)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP},
        )
        if found.x is None:
            return None
        return self._made([choice for choice, on in zip(self.choices, found.x, strict=True) if on > 0.5])

    def uniform(self, weights: str, activations: str) -> Assignment:
        """The assignment of the same formats to all layers that can have them."""
        return self._made(
            [
                choice
                for choice in self.choices
                if choice.weights == weights
                and choice.activations == (activations if self._has(choice.layer, activations) else NONE)
            ]
        )

    def _has(self, layer: int, activations: str) -> bool:
        return any(c.layer == layer and c.activations == activations for c in self.choices)

    def _fixed(self, name: str) -> int:
        return self.costs.fixed_bytes if name == SIZE else self.costs.fixed_bit_operations

    @cached_property
    def _one_each(self) -> tuple[list[Any], list[float]]:
        """One choice for each layer; layers that read one tensor agree on its format."""
        rows: list[Any] = []
        for number in range(len(self.layers)):
            rows.append([float(choice.layer == number) for choice in self.choices])
        low = [1.0] * len(rows)
        places = {layer.path: number for number, layer in enumerate(self.layers)}
        for number, layer in enumerate(self.layers):
            first = places.get(layer.reads, number)
            for name in sorted({c.activations for c in self.choices if c.layer == number}) * (
                first != number
            ):
                if self._has(first, name):
                    signs = {number: 1.0, first: -1.0}
                    rows.append([signs.get(c.layer, 0.0) * (c.activations == name) for c in self.choices])
                    low.append(0.0)
        return rows, low

    def _made(self, taken: Sequence[Choice]) -> Assignment:
        formats = {self.layers[c.layer].path: (c.weights, c.activations) for c in taken}
        size, macs = (self._fixed(name) + sum(getattr(c, name) for c in taken) for name in (SIZE, MACS))
        return Assignment(formats, sum(choice.harm for choice in taken), size, macs)


def _inputs(layer: LayerHarm, activations: Sequence[str]) -> list[str]:
    known = [name for name in activations if name in layer.best["activations"]]
    return known + [NONE] * (NONE in activations or not known)


def _choice(number: int, layer: LayerHarm, costs: Costs, weights: str, activations: str) -> Choice:
    stored, seen = parse_format(weights), parse_format(activations)
    assert stored is not None
    return Choice(
        number,
        weights,
        activations,
        score(layer.best, weights, activations),
        costs.bytes(layer.path, stored),
        costs.bit_operations(layer.path, stored, seen),
    )
