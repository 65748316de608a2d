"""Describe an artifact or a model, and the words that recipes know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from qdeploy.store.artifact import Checkpoint, described
from qdeploy.store.manifest import damage, is_artifact, read_manifest
from qdeploy.store.names import is_contained
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import did_you_mean


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe an artifact, or the model at ``path``.

    Returns:
        For an artifact its manifest's entries, the sizes of its files and ``valid``; if that is false,
        ``problem`` states why. For a checkpoint with groups of timesteps also ``timestep_gain``, from
        `qdeploy.evaluate.timestep_gain.timestep_gain`; and ``effective_bits``, where it has them.

    Raises:
        InvalidInputError: there is neither an artifact nor a model that this version can read.
    """
    folder = Path(path)
    if not is_artifact(folder):
        return _inspect_model(str(path))
    artifact = described(folder, read_manifest(folder))
    manifest = artifact.manifest
    problems = list(damage(folder, manifest))
    sizes = {name: (folder / name).stat().st_size for name in manifest.files if is_contained(folder, name)}
    extra = {} if problems or not isinstance(artifact, Checkpoint) else _of_checkpoint(artifact)
    return {
        "kind": artifact.kind,
        "description": artifact.DESCRIPTION,
        "path": str(folder),
        "schema": manifest.schema,
        "version": manifest.version,
        "sha256": manifest.sha256,
        "valid": not problems,
        **({"problem": problems[0]} if problems else {}),
        "made_from": manifest.made_from,
        "recipe": manifest.recipe,
        "seed": manifest.seed,
        "facts": manifest.facts,
        **extra,
        "measured": manifest.measured,
        "notes": msgspec.to_builtins(manifest.notes),
        "size_mb": round(sum(sizes.values()) / 2**20, 3),
        "files": sizes,
    }


def _of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What its files show beyond its facts."""
    from qdeploy.evaluate.effective_bits import effective_bits
    from qdeploy.evaluate.timestep_gain import timestep_gain

    bits, gain = effective_bits(checkpoint), timestep_gain(checkpoint)
    return {
        **({} if bits is None else {"effective_bits": bits}),
        **({} if gain is None else {"timestep_gain": gain}),
    }


def _inspect_model(source: str) -> dict[str, Any]:
    from qdeploy.model.folder import open_model
    from qdeploy.model.weights import stored_types

    model = open_model(source)
    denoiser = model.load()
    return {
        "kind": "model",
        "path": str(model.path),
        "schema": None,
        "sha256": model.sha256,
        "valid": True,
        "made_from": {},
        "recipe": None,
        "seed": None,
        "component": model.name,
        "class": model.class_name,
        "pipeline": model.has_pipeline,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "weight_files": [file.name for file in model.weights],
        **({"variant": model.weight_files.variant} if model.weight_files.variant else {}),
        **(
            {"not_read": [file.name for file in model.weight_files.unread]}
            if model.weight_files.unread
            else {}
        ),
        "stored_as": stored_types(model.weights),
        "size_mb": round(sum(file.stat().st_size for file in model.weights) / 2**20, 3),
    }


def methods() -> dict[str, Any]:
    """The words that recipes and options know, with a line on each; metrics, and passes of other packages."""
    from qdeploy.evaluate.metrics.base import metrics
    from qdeploy.export.lower import other_passes, path_of
    from qdeploy.recipe.coverage import COVERAGES
    from qdeploy.recipe.effort import EFFORTS
    from qdeploy.recipe.formats import FORMATS, NONE
    from qdeploy.recipe.resolve import presets
    from qdeploy.recipe.stages import methods as known_methods
    from qdeploy.recipe.stages import stages
    from qdeploy.recipe.targets import TARGETS

    return {
        "methods": {
            name: {
                "description": method.description,
                "paper": method.paper,
                "stages": [stage.name for stage in method.stages],
            }
            for name, method in known_methods().items()
        },
        "stages": {
            name: {"description": stage.description, "options": stage.defaults()}
            for name, stage in stages().items()
        },
        "presets": presets(),
        "formats": [*FORMATS, NONE],
        "coverages": {name: coverage.description for name, coverage in COVERAGES.items()},
        "efforts": {
            name: f"{effort.rows} rows, {effort.rounding} rounding and {effort.scales} scale steps per unit"
            for name, effort in EFFORTS.items()
        },
        "targets": {name: target.description for name, target in TARGETS.items()},
        "metrics": {name: metric.description for name, metric in metrics().items()},
        "passes": {
            path_of(each): {
                "description": (each.__doc__ or "").strip().partition("\n")[0],
                "targets": list(each.targets),
            }
            for each in other_passes()
        },
    }


def explain(name: str) -> dict[str, Any]:
    """What one word of recipes and options means.

    Returns:
        ``name``, its ``kind`` and what is known of it: for a preset its recipe, for a stage its options.

    Raises:
        UsageError: there is no such word.
    """
    known = methods()
    for group, words in known.items():
        if name not in words:
            continue
        entry = words[name] if isinstance(words, Mapping) else _format(name)
        entry = dict(entry) if isinstance(entry, Mapping) else {"description": entry}
        if group == "presets":
            entry |= _preset(name)
        if group == "stages":
            entry["options"] = _options(name)
        return {"name": name, "kind": "pass" if group == "passes" else group.removesuffix("s"), **entry}
    near = did_you_mean(name, [word for words in known.values() for word in words])
    raise UsageError(f"unknown word {name!r}{near}: `qdeploy methods` lists all of them")


def _options(name: str) -> dict[str, Any]:
    """Defaults of a stage's options; those that are left to the effort say so."""
    from dataclasses import fields

    from qdeploy.recipe.stages import stages

    defaults = {option.name: option.default for option in fields(stages()[name])}
    return {option: "by the effort" if value is None else value for option, value in defaults.items()}


def _preset(name: str) -> dict[str, Any]:
    from qdeploy.recipe.resolve import resolve_recipe
    from qdeploy.recipe.which import choices

    evidence = [choice.evidence for choice in choices() if choice.preset == name]
    return {"recipe": resolve_recipe(name).to_json(), **({"measured": evidence} if evidence else {})}


def _format(name: str) -> dict[str, Any]:
    from dataclasses import asdict

    from qdeploy.recipe.formats import FORMATS

    return asdict(FORMATS[name]) if name in FORMATS else {"description": "stays in float"}
