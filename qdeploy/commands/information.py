"""``inspect`` and ``methods``: what there is."""

from __future__ import annotations

import click

from qdeploy.commands.base import print_result, verb


@click.command()
@click.argument("path")
@verb
def inspect(path: str, as_json: bool) -> None:
    """Say what an artifact or a model is, and whether it is intact."""
    from qdeploy.system.errors import InvalidInputError
    from qdeploy.workflows.inspect import description, inspect

    result = inspect(path)
    print_result(as_json, lambda: result, lambda: description(result))
    if not result["valid"]:
        raise InvalidInputError(f"{path} is not valid: {result['problem']}")


@click.command()
@verb
def methods(as_json: bool) -> None:
    """List methods, stages, presets, formats, coverages, efforts and targets."""
    from qdeploy.workflows.inspect import as_text, methods

    words = methods()
    print_result(as_json, lambda: words, lambda: as_text(words))
