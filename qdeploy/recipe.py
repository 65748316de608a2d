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

from qdeploy.calibrate.coverage import find_coverage
from qdeploy.calibrate.effort import find_effort
from qdeploy.errors import InvalidInputError, UsageError
from qdeploy.formats import parse_format
from qdeploy.targets import TARGETS, find_target

if TYPE_CHECKING:
    from qdeploy.calibrate.methods import Method

_PRESETS = Path(__file__).parent / "recipes"


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

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values; `from_json` undoes it."""
        value = asdict(self)
        value["stages"] = [{name: dict(options)} for name, options in self.stages]
        value["exclude"] = list(self.exclude)
        if not isinstance(self.timestep_groups, int):
            value["timestep_groups"] = list(self.timestep_groups)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_json`'s values."""
        stages = tuple(next(iter(stage.items())) for stage in value["stages"])
        groups = value.get("timestep_groups", 1)
        groups = groups if isinstance(groups, int) else tuple(groups)
        return cls(
            **{**value, "stages": stages, "exclude": tuple(value["exclude"]), "timestep_groups": groups}
        )

    @property
    def precision(self) -> str:
        """The usual short form, such as W4A8; ``fp`` stands for what is left in float."""
        weights, activations = parse_format(self.weights), parse_format(self.activations)
        return f"W{weights.short if weights else 'fp'}A{activations.short if activations else 'fp'}"

    def simulated(self) -> list[str]:
        """Why no engine can run the result; empty if one can."""
        coverage = find_coverage(self.coverage)
        targets = [target for target in TARGETS.values() if target.backends]
        reasons = []
        if coverage.attention and self.activations != "none":
            reasons.append(f"coverage {self.coverage} quantizes q, k, v and the softmax output")
        if not any(self.weights in target.weights for target in targets):
            reasons.append(f"no engine has a kernel for {self.weights} weights")
        if not any(self.activations in target.activations for target in targets):
            reasons.append(f"no engine has a kernel for {self.activations} activations")
        return reasons + self.simulated_stages()

    def simulated_stages(self) -> list[str]:
        """Why no engine can run what the stages make of a network; empty if one can."""
        from qdeploy.calibrate.methods import stages

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
    if "coverage" not in values:
        values["coverage"] = _find_method(values["method"]).coverage
    if "target" not in values:
        attention = find_coverage(values.get("coverage", "portable")).attention
        values["target"] = "simulated" if attention else "portable"
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
    from qdeploy.calibrate.methods import find_method

    return find_method(name)


def _checked(values: dict[str, Any]) -> Recipe:
    from qdeploy.calibrate.methods import check_stages

    method = _find_method(values["method"])
    values["stages"] = check_stages(values.get("stages") or method.stages)
    try:
        recipe = Recipe(**values)
        recipe = replace(recipe, seed=int(recipe.seed))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the recipe cannot be used: {error}") from error
    coverage, target = find_coverage(recipe.coverage), find_target(recipe.target)
    find_effort(recipe.effort)
    _check_formats(recipe)
    if coverage.attention and not target.attention:
        raise UsageError(
            f"target {target.name} cannot run coverage {coverage.name}, which quantizes the attention "
            "products: choose --target simulated, or --coverage portable"
        )
    activations = parse_format(recipe.activations)
    if recipe.timestep_groups != 1 and activations is None:
        raise UsageError("timestep groups are groups of activation scales, and activations are 'none'")
    if recipe.timestep_groups != 1 and activations and not activations.symmetric and target.backends:
        raise UsageError(
            f"scales for groups of timesteps need a symmetric activation format, and {recipe.activations} has "
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


def _check_formats(recipe: Recipe) -> None:
    from qdeploy.calibrate.methods import stages

    target = find_target(recipe.target)
    for part in ("weights", "activations"):
        name, allowed = getattr(recipe, part), getattr(target, part)
        parse_format(name)
        if name not in allowed:
            able = [other.name for other in TARGETS.values() if name in getattr(other, part)]
            others = "simulated for research" if "simulated" in able else _words(able)
            where = f", or --target {others}" if able else ""
            raise UsageError(
                f"target {target.name} cannot run {name} {part}: choose {_words(allowed)}{where}"
            )
    weights, activations = parse_format(recipe.weights), parse_format(recipe.activations)
    if weights and weights.block and activations:
        raise UsageError(
            f"{weights.name} weights are dequantized before a product of floats: choose --activations none"
        )
    if bool(weights and weights.floating) != bool(activations and activations.floating):
        raise UsageError(
            f"{recipe.weights} weights and {recipe.activations} activations have no kernel together: fp8 needs "
            "both in fp8"
        )
    known = stages()
    uniform = [name for name, _ in recipe.stages if known[name].uniform]
    if weights and weights.floating and uniform:
        raise UsageError(
            f"stage {uniform[0]} needs steps that are all alike, and those of {weights.name} grow with the "
            "value: choose --method minmax, or integers"
        )


def _words(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


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
