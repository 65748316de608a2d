"""Recipes: everything that decides a calibration, resolved and checked before any work.

A recipe names a method, and the method is a list of stages; a recipe may also have its own list, so that
stages of several papers combine. `qdeploy.recipe.resolve` makes recipes from presets and files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from math import isfinite
from typing import Any

from qdeploy.recipe.coverage import find_coverage
from qdeploy.recipe.effort import find_effort
from qdeploy.recipe.format_rules import check_formats, check_unblocked
from qdeploy.recipe.formats import NONE, SOFTMAX, Format, integer, parse_format
from qdeploy.recipe.layer_formats import Overrides, combinations, formats_of, parse_overrides, span
from qdeploy.recipe.stages import (
    ForeignStage,
    Stage,
    check_stages,
    find_method,
    make_stage,
    stages,
)
from qdeploy.recipe.targets import TARGETS, find_target
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.suggest import unknown


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a calibration.

        Recipe("int4", "int8", stages=[WeightRanges("lp"), AdaRound(steps=5000), ActivationRanges("percentile")])

    What is left out is filled in when the recipe is made, and all of it is checked then.

    Attributes:
        weights: format of weights, or ``none``.
        activations: format of layer inputs, or ``none``.
        method: name of the method.
        stages: the stages, in order; the method's own by default.
        coverage: which layers are quantized; what the method is meant for by default.
        target: the grid that rounding has to know; what the coverage is meant for by default.
        effort: how much work is done.
        seed: where all randomness comes from.
        exclude: shell globs of layer paths that stay in float.
        timestep_groups: how many groups of timesteps have activation scales of their own, or the largest
            timestep of each group but the last.
        layers: shell globs of layer paths with formats of their own, see `qdeploy.recipe.layer_formats`.
        unblocked: where ``weights`` are in blocks, the format of the weights that blocks do not fit, such as those of
            convolutions; ``none`` leaves these layers in float. Their inputs stay in float, but next to nvfp4, where
            they have this format too.
        softmax: where the coverage quantizes attention, the format of the softmax output; ``none`` leaves it in
            float, and q·k in integers.

    Raises:
        UsageError: unknown names, or a combination that the target cannot run.
        InvalidInputError: a value of a type that cannot be used.
    """

    weights: str = "int8"
    activations: str = "int8"
    method: str = field(default="minmax", kw_only=True)
    stages: Sequence[Stage] = field(default=(), kw_only=True)
    coverage: str = field(default="", kw_only=True)
    target: str = field(default="", kw_only=True)
    effort: str = field(default="balanced", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    exclude: Sequence[str] = field(default=(), kw_only=True)
    timestep_groups: int | tuple[float, ...] = field(default=1, kw_only=True)
    layers: Overrides = field(default=(), kw_only=True)
    unblocked: str = field(default=NONE, kw_only=True)
    softmax: str = field(default="uint8", kw_only=True)

    def __post_init__(self) -> None:
        """Fill in what was left out, and check."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        _check_kinds(values)
        method = find_method(self.method)
        self._set(
            stages=check_stages(self.stages or method.stages),
            exclude=tuple(self.exclude),
            timestep_groups=parse_groups(self.timestep_groups),
            layers=parse_overrides(self.layers),
            coverage=self.coverage or method.coverage,
            seed=_seed(self.seed),
        )
        self._set(target=self.target or find_coverage(self.coverage).target)
        _check(self)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values; `from_json` undoes it."""
        groups = self.timestep_groups
        value: dict[str, Any] = {
            "method": self.method,
            "stages": [{stage.name: stage.options} for stage in self.stages],
            "weights": self.weights,
            "activations": self.activations,
            "coverage": self.coverage,
            "target": self.target,
            "effort": self.effort,
            "seed": self.seed,
            "exclude": list(self.exclude),
            "timestep_groups": groups if isinstance(groups, int) else list(groups),
        }
        if self.layers:
            value["layers"] = [{pattern: dict(formats)} for pattern, formats in self.layers]
        if self.unblocked != NONE:
            value["unblocked"] = self.unblocked
        if self.softmax != "uint8":
            value["softmax"] = self.softmax
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_json`'s values, as an artifact keeps it.

        What is known is not checked again; a stage that no installed package knows becomes a `ForeignStage`.

        Raises:
            InvalidInputError: something is missing or of another type.
        """
        _check_kinds(value)
        recipe = object.__new__(cls)
        defaults = {each.name: each.default for each in fields(cls)}
        try:
            groups = value.get("timestep_groups", 1)
            recipe._set(
                **{
                    **defaults,
                    **{name: entry for name, entry in value.items() if name in defaults},
                    "stages": tuple(_written_stage(stage) for stage in value["stages"]),
                    "exclude": tuple(value["exclude"]),
                    "timestep_groups": groups if isinstance(groups, int) else tuple(groups),
                    "layers": parse_overrides(value.get("layers", ())),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"an artifact's recipe is not as it should be: {error!r}") from error
        return recipe

    def formats(self, path: str) -> tuple[Format | None, Format | None]:
        """The formats of a layer's weight and input; None for float."""
        weights, activations = formats_of(path, self.weights, self.activations, self.layers)
        return parse_format(weights), parse_format(activations)

    @property
    def calibrated(self) -> Format | None:
        """The format of layer inputs, if their scales are found by calibration."""
        activations = parse_format(self.activations)
        return None if activations is None or activations.dynamic else activations

    @property
    def attention(self) -> Format | None:
        """The format of q, k and v, if the coverage quantizes them: symmetric on engines."""
        operands = self.calibrated
        if operands is None or not find_coverage(self.coverage).attention:
            return None
        return integer(operands.bits) if find_target(self.target).backends else operands

    @property
    def probabilities(self) -> Format | None:
        """The format of the softmax output where attention is quantized; None for float."""
        return SOFTMAX[self.softmax]

    @property
    def combinations(self) -> list[tuple[str, str]]:
        """The pairs of formats of weights and activations that layers have, those of most layers first."""
        return combinations(self.weights, self.activations, self.layers)

    @property
    def precision(self) -> str:
        """The usual short form, such as W4A8; ``fp`` means left in float.

        W3-8A8 says that layers have formats of their own, from 3 to 8 bits.
        """
        sides = zip(*((parse_format(name) for name in pair) for pair in self.combinations), strict=True)
        weights, activations = (span(formats) for formats in sides)
        return f"W{weights}A{activations}"

    @property
    def needs_rows(self) -> bool:
        """Whether one of the stages looks at calibration rows."""
        return any(stage.rows for stage in self.stages)

    def check_formats(self) -> None:
        """Refuse formats of any layer that the target or one of the stages cannot use.

        Raises:
            UsageError: a format is unknown, the target has no kernel for it, or two have none together.
        """
        check_formats(self.combinations, self.target, self.stages)

    def simulated(self) -> list[str]:
        """Why no engine can run the result; empty if one can."""
        targets = [target for target in TARGETS.values() if target.backends]
        reasons = []
        if self.attention is not None and not find_target(self.target).backends:
            reasons.append(f"coverage {self.coverage} quantizes q, k, v and the softmax output")
        elif self.attention is not None and self.softmax not in ("uint8", NONE):
            reasons.append(f"no engine has a kernel for a softmax output in {self.softmax}")
        for weights in dict.fromkeys(pair[0] for pair in self.combinations):
            if not any(weights in target.weights for target in targets):
                reasons.append(f"no engine has a kernel for {weights} weights")
        for activations in dict.fromkeys(pair[1] for pair in self.combinations):
            if not any(activations in target.activations for target in targets):
                reasons.append(f"no engine has a kernel for {activations} activations")
        return reasons + self.simulated_stages()

    def simulated_stages(self) -> list[str]:
        """Why no engine can run what the stages make of a network; empty if one can."""
        found = ((stage.name, stage.simulated()) for stage in self.stages)
        return [f"stage {name}: {reason}" for name, reason in found if reason]


def parse_groups(given: Any) -> int | tuple[float, ...]:
    """Groups of timesteps from a number, a list of boundaries, or a word that says either.

    Raises:
        UsageError: it is neither a positive number nor ascending boundaries.
    """
    words = [given] if isinstance(given, int | float) else given
    words = words.split(",") if isinstance(words, str) else words
    try:
        numbers = [float(word) for word in words]
    except (TypeError, ValueError):
        numbers = []
    numbers = numbers if all(map(isfinite, numbers)) else []
    single = len(numbers) == 1 and not (isinstance(given, list | tuple) or "," in str(given))
    if single and numbers[0] == int(numbers[0]) and numbers[0] >= 1:
        return int(numbers[0])
    if not numbers or single or any(a >= b for a, b in pairwise(numbers)):
        raise UsageError(
            f"timestep groups are a number of groups or ascending boundaries such as 200,500, not {given!r}"
        )
    return tuple(numbers)


def _check_kinds(values: Mapping[str, Any]) -> None:
    for name in ("method", "weights", "activations", "coverage", "target", "effort", "unblocked", "softmax"):
        if not isinstance(values.get(name, ""), str):
            raise InvalidInputError(f"the recipe's {name} must be one word, not {values[name]!r}")
    exclude = values.get("exclude", ())
    if isinstance(exclude, str) or not (
        isinstance(exclude, Iterable) and all(isinstance(pattern, str) for pattern in exclude)
    ):
        raise InvalidInputError(f"the recipe's exclude must be a list of patterns, not {exclude!r}")


def _seed(given: Any) -> int:
    try:
        return int(given)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the recipe's seed must be a whole number, not {given!r}") from error


def _written_stage(entry: Mapping[str, Mapping[str, Any]]) -> Stage:
    ((name, options),) = entry.items()
    if name in stages() and options.keys() <= stages()[name].defaults().keys():
        return make_stage(name, options)
    return ForeignStage(name, options)


def _check(recipe: Recipe) -> None:
    coverage, target = find_coverage(recipe.coverage), find_target(recipe.target)
    find_effort(recipe.effort)
    recipe.check_formats()
    check_unblocked(recipe.weights, recipe.unblocked, recipe.target)
    if recipe.softmax not in SOFTMAX:
        raise UsageError(unknown("format of the softmax output", recipe.softmax, SOFTMAX))
    if recipe.softmax != "uint8" and not coverage.attention:
        raise UsageError(
            f"coverage {coverage.name} leaves the softmax output in float: 'softmax' is for those that quantize it"
        )
    if coverage.attention and not target.attention:
        raise UsageError(
            f"target {target.name} cannot run coverage {coverage.name}, which quantizes the attention "
            "products: choose --target openvino, or --coverage portable"
        )
    seen = [parse_format(pair[1]) for pair in recipe.combinations]
    if recipe.timestep_groups != 1 and not any(format and not format.dynamic for format in seen):
        raise UsageError(
            f"timestep groups are groups of calibrated activation scales, and activations are {recipe.activations!r}"
        )
    if recipe.timestep_groups != 1 and any(format and format.two_levels for format in seen):
        raise UsageError(
            f"timestep groups have no use with {recipe.activations} activations, whose blocks get their scales in "
            "each call: leave --timestep-groups out"
        )
    if target.backends and (reasons := recipe.simulated_stages()):
        raise UsageError(
            f"target {target.name} cannot run {reasons[0]}: choose --target simulated for research"
        )
    if recipe.weights == recipe.activations == "none":
        raise UsageError("nothing would be quantized: weights and activations are both 'none'")
    if recipe.weights == "none":
        raise UsageError("activations alone cannot be quantized: an integer kernel needs integer weights too")
