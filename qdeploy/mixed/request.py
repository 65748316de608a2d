"""The request of ``sensitivity``: a model in some formats, or a checkpoint in its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdeploy.model.folder import Model
from qdeploy.model.in_memory import ModelSource, artifact_or_model
from qdeploy.model.origin import source_model
from qdeploy.recipe.formats import NONE, parse_format
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.targets import find_target
from qdeploy.store.artifact import Artifact, Checkpoint, open_artifact
from qdeploy.system.errors import UsageError

WIDTHS = ("int8", "int6", "int5", "int4", "int3")


@dataclass(frozen=True)
class Work:
    """What is to be measured.

    Attributes:
        model: the full-precision model.
        recipe: which layers, which range finders, and the formats of the ranking.
        formats: weight formats to try.
        checkpoint: the checkpoint whose own scales and roundings are measured; None for those of range finders.
    """

    model: Model
    recipe: Recipe
    formats: tuple[str, ...]
    checkpoint: Checkpoint | None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return (self.model.path if self.checkpoint is None else self.checkpoint.path).name


def work_of(
    source: ModelSource | Artifact,
    recipe: str | Path | Recipe | None,
    formats: Sequence[str] | None,
    reference: ModelSource | None,
    given: dict[str, Any],
) -> Work:
    """The request that a source and options make together.

    Raises:
        UsageError: an option does not belong to a checkpoint, or a format cannot be tried.
        InvalidInputError: there is no model, or not the one that a checkpoint was made from.
    """
    model = artifact_or_model(source)
    if isinstance(model, Path):
        named = [name for name, value in {**given, "recipe": recipe, "formats": formats}.items() if value]
        if named:
            raise UsageError(f"a checkpoint has a recipe of its own: leave out --{named[0]}")
        checkpoint = open_artifact(model, Checkpoint)
        own = Recipe.from_json(checkpoint.recipe or {})
        names = dict.fromkeys(weights for weights, _ in own.combinations if weights != NONE)
        return Work(source_model(checkpoint, reference), own, tuple(names), checkpoint)
    if reference is not None:
        raise UsageError("--reference belongs to a checkpoint; the model itself is named here")
    if isinstance(recipe, Recipe):
        base = recipe
    else:
        base = resolve_recipe(recipe, effort="fast", **(given if recipe else {**given, "weights": "int4"}))
    listed = tuple(dict.fromkeys(formats)) if formats else (*dict.fromkeys((*WIDTHS, base.weights)),)
    for name in listed:
        wanted = parse_format(name)
        if wanted is None or wanted.block or wanted.floating:
            raise UsageError(f"the harm of {name!r} is not measured: choose integer formats such as int4")
        if formats:
            replace(base, weights=name).check_formats()
    able = tuple(name for name in listed if name in find_target(base.target).weights)
    return Work(model, base, able, None)
