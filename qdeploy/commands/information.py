"""``init``, ``inspect`` and ``methods``: where to begin, and what there is."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from qdeploy.commands import complete
from qdeploy.commands.base import print_result, verb
from qdeploy.commands.options import Verb
from qdeploy.system.errors import UsageError

_INIT = Verb("qdeploy.workflows.init", "init")


@click.command()
@click.argument("model", required=False, shell_complete=complete.models)
@_INIT.option("output", "YAML file to write.")
@_INIT.option("processor", "cpu, avx2, tensorrt or rtx.  [default: asked for, or this machine's]", "--for")
@click.option("--wish", help="speed, size, quality, 4-bit or 8-bit.  [default: asked for, or speed]")
@_INIT.option("overwrite", "Replace the file.")
@verb
def init(model: str | None, as_json: bool, **options: Any) -> None:
    """Ask three questions, and write the recipe that fits the answers."""
    asking = sys.stdin.isatty() and not as_json
    if model is None and not asking:
        raise UsageError("name the model: qdeploy init MODEL --for cpu --wish speed")
    if asking:
        model, options = ask(model, options)
    made = _INIT.call(model, **options)

    def text() -> str:
        measured = f"\n{made['evidence']}" if made["evidence"] else ""
        lines = "\n".join(f"  {line}" for line in made["commands"])
        return f"{made['path']}: {made['preset']}, {made['why']}{measured}\nnext:\n{lines}"

    print_result(as_json, lambda: made, text)


def ask(model: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Ask on the terminal for what was not given as an option."""
    from qdeploy.recipe.which import PROCESSORS, WISHES
    from qdeploy.workflows.init import this_processor

    model = model or click.prompt("model: a diffusers folder, a Hub id, or digits, digits-dit, scenes")
    for name, what, known, first in (
        ("processor", "where will the engine run", PROCESSORS, this_processor()),
        ("wish", "what matters most", WISHES, "speed"),
    ):
        options[name] = options[name] or click.prompt(what, type=click.Choice(list(known)), default=first)
    return str(model), options


@click.command()
@click.argument("path")
@verb
def inspect(path: str, as_json: bool) -> None:
    """Say what an artifact or a model is, and whether it is intact."""
    from qdeploy.system.errors import InvalidInputError
    from qdeploy.workflows.describe import description
    from qdeploy.workflows.inspect import inspect

    result = inspect(path)
    print_result(as_json, lambda: result, lambda: description(result))
    if not result["valid"]:
        raise InvalidInputError(f"{path} is not valid: {result['problem']}")


@click.command()
@click.argument("name", required=False)
@click.option("--which", "question", help="Which preset for a model, processor and wish: 'dit cpu 4-bit'.")
@verb
def methods(name: str | None, question: str | None, as_json: bool) -> None:
    """List methods, stages, presets, formats, coverages, efforts, targets and metrics; or explain one."""
    from qdeploy.workflows.describe import explanation, overview
    from qdeploy.workflows.inspect import explain, methods

    if name and question is not None:
        raise UsageError("NAME and --which ask two questions: ask one of them")
    if question is not None:
        _which(question, as_json)
        return
    words: dict[str, Any] = explain(name) if name else methods()
    print_result(as_json, lambda: words, lambda: explanation(words) if name else overview(words))


def _which(question: str, as_json: bool) -> None:
    from qdeploy.recipe.which import which

    found = which(question)

    def text() -> str:
        return "\n".join(
            f"{choice.command}\n    {choice.why}"
            + (
                f"\n    measured: {choice.evidence}"
                if choice.measured or choice.blocks
                else f"\n    {choice.evidence}"
            )
            for choice in found
        )

    print_result(as_json, lambda: {"presets": [asdict(each) for each in found]}, text)
