"""Words that a shell completes: names of presets and of shipped models."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def presets(ctx: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
    """Presets that begin so, with their descriptions; and files."""
    from qdeploy.recipe.resolve import presets

    found = [CompletionItem(name, help=text) for name, text in presets().items() if name.startswith(start)]
    return found or [CompletionItem(start, type="file")]


def models(ctx: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
    """Shipped models that begin so, or folders."""
    from qdeploy.model.zoo import zoo_models

    found = [CompletionItem(name) for name in zoo_models() if name.startswith(start)]
    return found or [CompletionItem(start, type="dir")]
