"""Recipes from presets, YAML files and single options.

Presets are the YAML files in ``presets/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.stages import Stage, make_stage
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.suggest import unknown

_PRESETS = Path(__file__).parent / "presets"


def resolve_recipe(preset: str | Path | Recipe | None = None, **given: Any) -> Recipe:
    """The recipe of a preset or YAML file, with what the caller gave on top.

    Args:
        preset: name of a preset, path of a YAML file, or a recipe; None for defaults.
        given: fields of `Recipe`; None means not given. Another method than the preset's brings its own stages.
            ``options`` holds options of stages by name (see `with_options`).

    Raises:
        InvalidInputError: the file is no recipe.
        UsageError: unknown names, or a combination that the target cannot run.
    """
    options = given.pop("options", None)
    values = _values(preset)
    chosen = {key: value for key, value in given.items() if value is not None}
    if "method" in chosen and chosen["method"] != values.get("method"):
        values.pop("stages", None)
    values |= chosen
    values.pop("description", None)
    known = [each.name for each in fields(Recipe)]
    for surplus in sorted(values.keys() - set(known)):
        raise InvalidInputError(unknown("entry of the recipe", surplus, known))
    recipe = Recipe(**values)
    return recipe if not options else replace(recipe, stages=with_options(recipe.stages, options))


def with_options(listed: Sequence[Stage], options: Mapping[str, Mapping[str, Any]]) -> list[Stage]:
    """Stages of a list with some of their options replaced.

    Args:
        listed: the stages.
        options: new values by stage and option: ``{"round-weights": {"steps": 5000}}``. A stage that is listed
            more than once gets them everywhere.

    Raises:
        UsageError: no such stage is listed, or it has no such option.
    """
    for name in options:
        if name not in {stage.name for stage in listed}:
            known = ", ".join(dict.fromkeys(stage.name for stage in listed))
            raise UsageError(f"the recipe has no stage {name!r} to set options of: it has {known}")
    return [
        make_stage(stage.name, {**stage.options, **options.get(stage.name, {})})
        if stage.name in options
        else stage
        for stage in listed
    ]


def _values(preset: str | Path | Recipe | None) -> dict[str, Any]:
    if isinstance(preset, Recipe):
        return {each.name: getattr(preset, each.name) for each in fields(preset)}
    return dict(_read(preset)) if preset is not None else {}


def presets() -> dict[str, str]:
    """The presets with their descriptions."""
    return {file.stem: str(_load(file).get("description", "")) for file in sorted(_PRESETS.glob("*.yaml"))}


def preset_values(name: str) -> dict[str, Any]:
    """What a preset's file says, to be written into another.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in presets():
        raise UsageError(unknown("recipe", name, presets()))
    return dict(_load(_PRESETS / f"{name}.yaml"))


def _read(preset: str | Path) -> Mapping[str, Any]:
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        path = _PRESETS / f"{preset}.yaml"
        if not path.is_file():
            raise UsageError(unknown("recipe", str(preset), presets(), ", or a YAML file"))
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
    from qdeploy.store.bounded_yaml import read_yaml

    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as a recipe: {str(error).splitlines()[0]}") from error
    if not isinstance(values, Mapping):
        raise InvalidInputError(f"{path} is no recipe: it holds no mapping")
    return values
