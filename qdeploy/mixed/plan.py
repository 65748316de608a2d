"""From a budget to a recipe: the best formats within it, and the results of other budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.mixed.assignment import Assignment, AssignmentProblem
from qdeploy.mixed.budget import MACS, SIZE, Limit, in_words
from qdeploy.mixed.costs import Costs, costs_of, stored_bytes
from qdeploy.mixed.ranking import LayerHarm, read_sensitivity_file
from qdeploy.model.folder import Model
from qdeploy.network.roles import find_structure
from qdeploy.quant.insert import quantize_structure
from qdeploy.recipe.formats import NONE
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Artifact, Checkpoint, Sensitivity, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.files import write_text
from qdeploy.store.paths import cache_entry
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_of
from qdeploy.system.tables import Table, number

POINTS = 9
RECIPE, BUDGET = "recipe.yaml", "budget.json"


@dataclass(frozen=True)
class BudgetPlan:
    """The result of a budget.

    Attributes:
        recipe: the recipe with formats layer by layer.
        chosen: the assignment behind it.
        bounds: the budget: largest ``size`` in bytes and ``macs`` in bit-operations.
        curve: assignments of other budgets, ascending in the cost that is limited.
        uniform: assignments with one format for all weights, by its name.
        sensitivity: hash of the sensitivities.
    """

    recipe: Recipe
    chosen: Assignment
    bounds: Mapping[str, int]
    curve: Sequence[Assignment]
    uniform: Mapping[str, Assignment]
    sensitivity: str

    def to_json(self) -> dict[str, Any]:
        """``budget.json``."""
        counts = Counter(weights for weights, _ in self.chosen.formats.values())
        return {
            "bounds": dict(self.bounds),
            "chosen": {**_point(self.chosen), "layers_by_weights": dict(sorted(counts.items()))},
            "curve": [_point(point) for point in self.curve],
            "uniform": {name: _point(point) for name, point in self.uniform.items()},
            "sensitivity": self.sensitivity,
        }

    def table(self) -> str:
        """The trade-off for people: uniform formats, other budgets, and what was chosen."""
        rows = [(f"all {name}", *_cells(point)) for name, point in self.uniform.items()]
        rows += [("budget", *_cells(point)) for point in self.curve]
        rows += [("chosen", *_cells(self.chosen))]
        return Table(["weights", "MB", "G bit-operations", "predicted SQNR, dB"], rows).text()

    def write(self, draft: Draft[Checkpoint], component: str) -> None:
        """Add ``budget.json``, with the size that was reached, and ``recipe.yaml`` to a finished checkpoint."""
        size = stored_bytes(draft.content / component)
        draft.json(BUDGET, {**self.to_json(), "stored_size": size})
        write_text(draft.content / RECIPE, self.recipe_text())

    def recipe_text(self) -> str:
        """The recipe as YAML that can be edited and given to ``--recipe``."""
        bounds = ", ".join(in_words(name, bound) for name, bound in self.bounds.items())
        values = {"description": f"mixed precision within {bounds}", **self.recipe.to_json()}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def plan(
    recipe: Recipe, sensitivity: Sensitivity, model: Model, costs: Costs, limits: Mapping[str, Limit]
) -> BudgetPlan:
    """The formats of least harm within budgets.

    Args:
        recipe: what is the same for all layers: method, coverage, target, activations, ...
        sensitivity: what `qdeploy.sensitivity` measured.
        model: the model that is to be quantized.
        costs: of its network, its quantizers placed by the recipe.
        limits: the budgets, by cost.

    Raises:
        InvalidInputError: the sensitivities are of another model, or of other layers or formats.
        UsageError: no assignment meets the budgets; the closest one is offered.
    """
    layers, weights = _read(sensitivity, model, recipe, list(costs.macs))
    # Float inputs cost no bytes: a bound on size alone would leave all of them in float.
    inputs = [recipe.activations] + [NONE] * (MACS in limits and recipe.activations != NONE)
    problem = AssignmentProblem(layers, costs, weights, inputs)
    full = {SIZE: costs.float_bytes, MACS: costs.float_bit_operations}
    bounds = {name: limit.bound(full[name]) for name, limit in limits.items()}
    chosen = problem.solve(bounds)
    if chosen is None:
        raise UsageError(_closest(problem, bounds))
    uniform = {name: problem.uniform(name, recipe.activations) for name in weights}
    resolved = replace(recipe, **_as_layers(chosen))
    return BudgetPlan(resolved, chosen, bounds, _curve(problem, bounds), uniform, sensitivity.sha256)


def plan_for(
    model: Model,
    data: CalibrationSet,
    recipe: Recipe,
    limits: Mapping[str, Limit],
    sensitivity: str | Path | Artifact | None,
    device: str,
) -> BudgetPlan:
    """The plan of a calibration; sensitivities that are not given are measured, and kept in the cache.

    Raises:
        InvalidInputError: the sensitivities do not fit.
        UsageError: the budgets cannot be met, or the recipe chooses formats itself.
    """
    if recipe.layers:
        raise UsageError(
            "the recipe already has formats of single layers: leave out --budget, or these formats"
        )
    base = replace(recipe, weights="int4", effort="fast")
    if sensitivity is None:
        from qdeploy.mixed.sensitivity import sensitivity as measure

        name = sha256_of([model.sha256, data.sha256, base.to_json()])[:32]
        with cache_entry("sensitivity", name) as place:
            made = measure(model.path, place, recipe=base, calibration=data.artifact, device=device)
        assert isinstance(made, Sensitivity)
        sensitivity = made
    denoiser = model.load()
    structure = find_structure(denoiser, data.inputs([0]))
    quantize_structure(denoiser, structure, base)
    found = open_artifact(sensitivity, Sensitivity)
    return plan(recipe, found, model, costs_of(denoiser, structure), limits)


def _read(
    sensitivity: Sensitivity, model: Model, recipe: Recipe, paths: list[str]
) -> tuple[list[LayerHarm], list[str]]:
    where = sensitivity.path
    if sensitivity.facts.model_sha256 != model.sha256:
        raise InvalidInputError(f"{where} holds sensitivities of another model than {model.path}")
    report = read_sensitivity_file(sensitivity.report)
    found = {layer.path: layer for layer in report.harms()}
    if lacking := [path for path in paths if path not in found]:
        raise InvalidInputError(
            f"{where} has no entry for {lacking[0]}: measure sensitivities with coverage {recipe.coverage}"
        )
    layers = [found[path] for path in paths]
    known = {name for layer in layers for name in layer.best["activations"]}
    if recipe.activations != NONE and recipe.activations not in known:
        raise InvalidInputError(f"{where} has no entry for {recipe.activations} activations: measure them")
    if "checkpoint" in sensitivity.made_from:
        raise InvalidInputError(
            f"{where} was measured on a checkpoint in its own formats: measure the model's"
        )
    return layers, report.formats


def _closest(problem: AssignmentProblem, bounds: Mapping[str, int]) -> str:
    """Why no assignment meets the bounds, and the closest budget that one does."""
    for name, bound in bounds.items():
        least = problem.solve({}, least=name)
        assert least is not None
        if least.cost(name) > bound:
            return (
                f"the budget {in_words(name, bound)} cannot be met: the least that these formats allow is "
                f"{in_words(name, least.cost(name))}"
            )
    first, second = bounds
    nearest = problem.solve({first: bounds[first]}, least=second)
    assert nearest is not None
    return (
        f"the budgets cannot be met together: with {in_words(first, bounds[first])} the least is "
        f"{in_words(second, nearest.cost(second))}"
    )


def _curve(problem: AssignmentProblem, bounds: Mapping[str, int]) -> list[Assignment]:
    """Best assignments for bounds from the least to the most that the first limited cost can be."""
    name = next(iter(bounds))
    least, most = problem.solve({}, least=name), problem.solve({})
    assert least is not None
    assert most is not None
    low, high = least.cost(name), most.cost(name)
    steps = (low + (high - low) * step / (POINTS - 1) for step in range(POINTS))
    found = (problem.solve({name: int(step) + 1}) for step in steps)
    return [point for point in found if point is not None]


def _as_layers(chosen: Assignment) -> dict[str, Any]:
    """Fields of a recipe: the formats of most layers, and the layers that have others."""
    base = Counter(chosen.formats.values()).most_common(1)[0][0]
    different = []
    for path, (weights, activations) in chosen.formats.items():
        formats = {} if weights == base[0] else {"weights": weights}
        formats |= {} if activations == base[1] else {"activations": activations}
        if formats:
            different.append((path, formats))
    return {"weights": base[0], "activations": base[1], "layers": tuple(different)}


def _point(point: Assignment) -> dict[str, Any]:
    return {
        "size": point.size,
        "bit_operations": point.macs,
        "harm": float(f"{point.harm:.9g}"),
        "sqnr_db": round(point.sqnr_db, 2),
    }


def _cells(point: Assignment) -> tuple[str, str, str]:
    return number(point.size / 10**6, 3), number(point.macs / 10**9, 2), number(point.sqnr_db)
