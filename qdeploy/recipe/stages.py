"""Calibration methods: one file per paper, found by themselves.

A file defines ``METHOD`` and, in ``STAGES``, the stages that its paper brought. A stage is a function
``stage(session, *, option=default, ...)``; a method is a list of stages with options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from qdeploy.recipe.effort import Effort
from qdeploy.system.errors import UsageError

METHODS = "qdeploy.calibrate.methods"  # every module there is looked at

# What stages leave behind for others.
WEIGHT_SCALES, ROUNDINGS, ACTIVATION_SCALES = "weight scales", "roundings", "activation scales"
RESULTS = (WEIGHT_SCALES, ROUNDINGS, ACTIVATION_SCALES)

Stages = tuple[tuple[str, Mapping[str, Any]], ...]


@dataclass(frozen=True)
class Stage:
    """One step of a method.

    Attributes:
        name: the word that recipes use.
        run: does it; keyword arguments are its options.
        description: one line for people.
        cost: for its options, a number of units and an effort, how often it runs the denoiser over all rows,
            and how many training steps it makes per unit. The estimate of a calibration comes from this.
        paper: where it comes from, if not from the method's own paper.
        needs: what earlier stages must have given: some of `RESULTS`.
        gives: what it gives.
        spoils: what must not be there yet, since this stage changes what it was made from.
        uniform: whether it needs integer codes, as learned rounding does: up or down by one equal step.
        simulated: for its options, why no engine can run the result; empty if one can.
        last: whether nothing may come after it, since it measures the result.
    """

    name: str
    run: Callable[..., None]
    description: str
    cost: Callable[[Mapping[str, Any], int, Effort], tuple[float, float]]
    paper: str = ""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    spoils: tuple[str, ...] = ()
    uniform: bool = False
    simulated: Callable[[Mapping[str, Any]], str] = lambda options: ""
    last: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options with their defaults."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: the word that recipes use.
        paper: where it was published.
        description: one line for people.
        stages: what it consists of.
        coverage: the profile that it is meant for, where a recipe names none.
    """

    name: str
    paper: str
    description: str
    stages: Stages
    coverage: str = "portable"


@cache
def _modules() -> tuple[Any, ...]:
    package = import_module(METHODS)
    return tuple(import_module(f"{METHODS}.{module.name}") for module in iter_modules(package.__path__))


def methods() -> dict[str, Method]:
    """All methods by name."""
    return {module.METHOD.name: module.METHOD for module in _modules() if hasattr(module, "METHOD")}


def stages() -> dict[str, Stage]:
    """All stages by name."""
    return {stage.name: stage for module in _modules() for stage in getattr(module, "STAGES", ())}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in methods():
        raise UsageError(f"unknown method {name!r}: choose from {', '.join(methods())}")
    return methods()[name]


def check_stages(listed: Iterable[tuple[str, Mapping[str, Any]]]) -> Stages:
    """The stages with all their options filled in.

    Raises:
        UsageError: a stage or an option is unknown, or the order is impossible.
    """
    known = stages()
    checked: list[tuple[str, Mapping[str, Any]]] = []
    there: set[str] = set()
    for name, options in listed:
        if name not in known:
            raise UsageError(f"unknown stage {name!r}: choose from {', '.join(known)}")
        unknown = options.keys() - known[name].options.keys()
        if unknown:
            raise UsageError(
                f"stage {name!r} has no option {sorted(unknown)[0]!r}: it has {', '.join(known[name].options)}"
            )
        if checked and known[checked[-1][0]].last:
            raise UsageError(f"stage {checked[-1][0]!r} measures the result: list it after {name!r}")
        if lacking := [result for result in known[name].needs if result not in there]:
            givers = [stage.name for stage in known.values() if lacking[0] in stage.gives]
            raise UsageError(f"stage {name!r} needs {lacking[0]}: list one of {', '.join(givers)} before it")
        if spoiled := [result for result in known[name].spoils if result in there]:
            raise UsageError(
                f"stage {name!r} changes what {spoiled[0]} were found for: list it before the stages that find "
                "them"
            )
        there |= set(known[name].gives)
        checked.append((name, {**known[name].options, **options}))
    return tuple(checked)
