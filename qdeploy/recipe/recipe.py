"""Recipes: everything that decides a calibration, resolved and checked before any work.

A recipe names a method, and the method is a list of stages; a recipe may also give its own list, so that
stages of several papers combine. Presets are the YAML files in ``recipes/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.recipe.coverage import find_coverage
from qdeploy.recipe.effort import find_effort
from qdeploy.recipe.format_rules import check_formats
from qdeploy.recipe.formats import Format, integer, parse_format
from qdeploy.recipe.layer_formats import Overrides, combinations, formats_of, parse_overrides, span
from qdeploy.recipe.targets import TARGETS, find_target
from qdeploy.system.errors import InvalidInputError, UsageError

if TYPE_CHECKING:
    from qdeploy.recipe.stages import Method

_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        method: name of the method.
        stages: the stages with their options, in order.
        weights: format of weights, or ``none``.
        activations: format of layer inputs, or ``none``.
        coverage: which layers are quantized.
        target: the grid that rounding has to know.
        effort: how much work is done.
        seed: where all randomness comes from.
        exclude: shell globs of layer paths that stay in float.
        timestep_groups: how many groups of timesteps have activation scales of their own, or the largest
            timestep of each group but the last.
        layers: shell globs of layer paths with formats of their own, as of `qdeploy.recipe.layer_formats`.
    """

    method: str
    stages: tuple[tuple[str, Mapping[str, Any]], ...]
    weights: str = "int8"
    activations: str = "int8"
    coverage: str = "portable"
    target: str = "portable"
    effort: str = "balanced"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    timestep_groups: int | tuple[float, ...] = 1
    layers: Overrides = ()

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values; `from_json` undoes it."""
        value = asdict(self)
        value["stages"] = [{name: dict(options)} for name, options in self.stages]
        value["exclude"] = list(self.exclude)
        if not isinstance(self.timestep_groups, int):
            value["timestep_groups"] = list(self.timestep_groups)
        value["layers"] = [{pattern: dict(formats)} for pattern, formats in self.layers]
        if not self.layers:
            del value["layers"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_json`'s values."""
        stages = tuple(next(iter(stage.items())) for stage in value["stages"])
        groups = value.get("timestep_groups", 1)
        groups = groups if isinstance(groups, int) else tuple(groups)
        parsed = {
            "stages": stages,
            "exclude": tuple(value["exclude"]),
            "timestep_groups": groups,
            "layers": parse_overrides(value.get("layers", ())),
        }
        return cls(**{**value, **parsed})

    def formats(self, path: str) -> tuple[Format | None, Format | None]:
        """The formats of a layer's weight and input; None for float."""
        weights, activations = formats_of(path, self.weights, self.activations, self.layers)
        return parse_format(weights), parse_format(activations)

    @property
    def attention(self) -> Format | None:
        """The format of q, k and v, if the coverage quantizes them: symmetric on engines."""
        operands = parse_format(self.activations)
        if operands is None or not find_coverage(self.coverage).attention:
            return None
        return integer(operands.bits) if find_target(self.target).backends else operands

    @property
    def combinations(self) -> list[tuple[str, str]]:
        """The pairs of formats of weights and activations that layers have, those of most layers first."""
        return combinations(self.weights, self.activations, self.layers)

    @property
    def precision(self) -> str:
        """The usual short form, such as W4A8; ``fp`` stands for what is left in float.

        W3-8A8 says that layers have formats of their own, from 3 to 8 bits.
        """
        sides = zip(*((parse_format(name) for name in pair) for pair in self.combinations), strict=True)
        weights, activations = (span(formats) for formats in sides)
        return f"W{weights}A{activations}"

    def check_formats(self) -> None:
        """Refuse formats of any layer that the target or one of the stages cannot use.

        Raises:
            UsageError: a format is unknown, the target has no kernel for it, or two have none together.
        """
        check_formats(self.combinations, self.target, [name for name, _ in self.stages])

    def simulated(self) -> list[str]:
        """Why no engine can run the result; empty if one can."""
        targets = [target for target in TARGETS.values() if target.backends]
        reasons = []
        if self.attention is not None and not find_target(self.target).backends:
            reasons.append(f"coverage {self.coverage} quantizes q, k, v and the softmax output")
        for weights in dict.fromkeys(pair[0] for pair in self.combinations):
            if not any(weights in target.weights for target in targets):
                reasons.append(f"no engine has a kernel for {weights} weights")
        for activations in dict.fromkeys(pair[1] for pair in self.combinations):
            if not any(activations in target.activations for target in targets):
                reasons.append(f"no engine has a kernel for {activations} activations")
        return reasons + self.simulated_stages()

    def simulated_stages(self) -> list[str]:
        """Why no engine can run what the stages make of a network; empty if one can."""
        from qdeploy.recipe.stages import stages

        known = stages()
        told = ((name, known[name].simulated(options)) for name, options in self.stages)
        return [f"stage {name}: {reason}" for name, reason in told if reason]


def resolve_recipe(preset: str | Path | None = None, **given: Any) -> Recipe:
    """The recipe of a preset or YAML file, with what the caller gave on top.

    Args:
        preset: name of a preset, or path of a YAML file; None for defaults.
        given: fields of `Recipe`; None means not given.

    Raises:
        InvalidInputError: the file is no recipe.
        UsageError: unknown names, or a combination that the target cannot run.
    """
    values: dict[str, Any] = dict(_read(preset)) if preset is not None else {}
    chosen = {key: value for key, value in given.items() if value is not None}
    if "method" in chosen and chosen["method"] != values.get("method"):
        values.pop("stages", None)
    values |= chosen
    values.pop("description", None)
    unknown = values.keys() - {field.name for field in fields(Recipe)}
    if unknown:
        raise InvalidInputError(f"the recipe has an unknown entry {sorted(unknown)[0]!r}")
    _check_kinds(values)
    values.setdefault("method", "minmax")
    values["exclude"] = tuple(values.get("exclude", ()))
    values["timestep_groups"] = parse_groups(values.get("timestep_groups", 1))
    values["layers"] = parse_overrides(values.get("layers", ()))
    if "coverage" not in values:
        values["coverage"] = _find_method(values["method"]).coverage
    values.setdefault("target", find_coverage(values["coverage"]).target)
    return _checked(values)


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
    for name in ("method", "weights", "activations", "coverage", "target", "effort"):
        if not isinstance(values.get(name, ""), str):
            raise InvalidInputError(f"the recipe's {name} must be one word, not {values[name]!r}")
    exclude = values.get("exclude", ())
    if isinstance(exclude, str) or not (
        isinstance(exclude, Iterable) and all(isinstance(pattern, str) for pattern in exclude)
    ):
        raise InvalidInputError(f"the recipe's exclude must be a list of patterns, not {exclude!r}")


def presets() -> dict[str, str]:
    """The presets with their descriptions."""
    return {file.stem: str(_load(file).get("description", "")) for file in sorted(_PRESETS.glob("*.yaml"))}


def _find_method(name: str) -> Method:
    from qdeploy.recipe.stages import find_method

    return find_method(name)


def _checked(values: dict[str, Any]) -> Recipe:
    from qdeploy.recipe.stages import check_stages

    method = _find_method(values["method"])
    values["stages"] = check_stages(values.get("stages") or method.stages)
    try:
        recipe = Recipe(**values)
        recipe = replace(recipe, seed=int(recipe.seed))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the recipe cannot be used: {error}") from error
    coverage, target = find_coverage(recipe.coverage), find_target(recipe.target)
    find_effort(recipe.effort)
    recipe.check_formats()
    if coverage.attention and not target.attention:
        raise UsageError(
            f"target {target.name} cannot run coverage {coverage.name}, which quantizes the attention "
            "products: choose --target openvino, or --coverage portable"
        )
    seen = [parse_format(pair[1]) for pair in recipe.combinations]
    if recipe.timestep_groups != 1 and not any(seen):
        raise UsageError("timestep groups are groups of activation scales, and activations are 'none'")
    shifted = next((format for format in seen if format and not format.symmetric), None)
    if recipe.timestep_groups != 1 and shifted and target.backends:
        raise UsageError(
            f"scales for groups of timesteps need a symmetric activation format, and {shifted.name} has "
            "a zero point: choose --activations int8, or --target simulated for research"
        )
    if target.backends and (reasons := recipe.simulated_stages()):
        raise UsageError(
            f"target {target.name} cannot run {reasons[0]}: choose --target simulated for research"
        )
    if recipe.weights == recipe.activations == "none":
        raise UsageError("nothing would be quantized: weights and activations are both 'none'")
    if recipe.weights == "none":
        raise UsageError("activations alone cannot be quantized: an integer kernel needs integer weights too")
    return recipe


def _read(preset: str | Path) -> Mapping[str, Any]:
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        path = _PRESETS / f"{preset}.yaml"
        if not path.is_file():
            raise UsageError(
                f"unknown recipe {str(preset)!r}: choose from {', '.join(presets())}, or a YAML file"
            )
    values = _load(path)
    stages = values.get("stages")
    if stages is not None:
        if not isinstance(stages, list):
            raise InvalidInputError(f"{path}: stages must be a list, not {stages!r}")
        values = {**values, "stages": tuple(map(partial(_stage, path), stages))}
    return values


def _stage(path: Path, entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise InvalidInputError(f"{path}: a stage is a name, or a name with a mapping of options, not {entry!r}")


def _load(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidInputError(f"{path} cannot be read as a recipe: {str(error).splitlines()[0]}") from error
    if not isinstance(values, Mapping):
        raise InvalidInputError(f"{path} is no recipe: it holds no mapping")
    return values
