"""Options of verbs: names and help stand with the verb, types and defaults with the function that it calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from qdeploy.commands.signature import REQUIRED, Parameter, parameters
from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

Decorator = Callable[[Callable[..., Any]], Any]

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}
_SHORT = {"samples": ("-n",), "output": ("-o",)}


class Verb:
    """What a verb calls.

    Args:
        module: where the function is; imported when it is called.
        function: its name.
    """

    def __init__(self, module: str, function: str) -> None:
        self.module, self.function = module, function

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The function's parameters by name."""
        return parameters(self.module, self.function)

    def option(self, name: str, help: str, *flags: str, **settings: Any) -> Decorator:
        """An option for one of the function's parameters, of its type and with its default.

        Args:
            name: the parameter.
            help: one line. What a default of None means is said there.
            flags: how the option is written, if not ``--name``.
            settings: of `click.option`, where they differ from what the parameter says.
        """
        parameter = self.parameters[name]
        written = flags or (*_SHORT.get(name, ()), f"--{name.replace('_', '-')}")
        chosen = {**_settings(parameter, help), **settings}
        if chosen.get("multiple"):
            chosen["help"] += " Repeatable."
        elif "multiple" in chosen:
            del chosen["default"]
        return click.option(name, *written, **chosen)

    def call(self, *arguments: Any, **options: Any) -> Any:
        """Call the function with what was given; what was not is left to its defaults."""
        given = {name: value for name, value in options.items() if value is not None and value != ()}
        return getattr(import_module(self.module), self.function)(*arguments, **given)


def place_options(verb: Verb) -> Decorator:
    """The options of every verb that works in parts: where they are made."""

    def decorate(function: Callable[..., Any]) -> Any:
        for option in (
            verb.option("worker_cpus", "Processors for each worker."),
            verb.option("workers", "Workers on Ray.  [default: as many as there is room for]"),
            verb.option(
                "on",
                "Where parts are made: here, ray, ray://HOST:PORT; or plan, for `work`.",
            ),
        ):
            function = option(function)
        return function

    return decorate


def _settings(parameter: Parameter, help: str) -> dict[str, Any]:
    kinds, default = parameter.kinds, parameter.default
    if kinds == {"bool"}:
        return {"is_flag": True, "help": help}
    settings: dict[str, Any] = {"help": help if "[default" in help else help + _shown(default)}
    settings["type"] = next((_TYPES[kind] for kind in ("str", "float", "int") if kind in kinds), str)
    if kinds & {"Path", "ModelSource"}:
        settings["metavar"] = "PATH"
    if kinds & {"Sequence", "tuple"}:
        settings |= {"multiple": True, "default": ()}
    return settings


def _shown(default: Any) -> str:
    if default is REQUIRED or default is None or default == ():
        return ""
    return f"  [default: {default[0] if isinstance(default, tuple) else default}]"


def sampling_options(defaults: Sampling, **helps: str) -> Decorator:
    """The options of every verb that samples images: the fields of `Sampling`, and what names prompts.

    Args:
        defaults: what the verb samples with where nothing is said.
        helps: help of fields that mean more in this verb.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        decorated: Any = function
        for each in reversed(fields(Sampling)):
            if "help" not in each.metadata:
                continue
            parameter = Parameter(each.name, str(each.type), getattr(defaults, each.name))
            settings = _settings(parameter, helps.get(each.name, each.metadata["help"]))
            decorated = click.option(f"--{each.name}", **settings)(decorated)
        for option in reversed(_PROMPTS):
            decorated = option(decorated)
        return decorated

    return decorate


_PROMPTS = (
    click.option("--prompt", multiple=True, help="A prompt, or a class number. Repeatable."),
    click.option("--negative-prompt", multiple=True, help="What images shall not show. Repeatable."),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="Text file, one prompt per line; or COCO captions, *.json.",
    ),
    click.option("--prompt-count", type=int, help="Prompts to take from the file.  [default: up to 5000]"),
    click.option("--prompt-seed", type=int, help="Draw them at random.  [default: the first ones]"),
    click.option(
        "--pipeline-arg",
        multiple=True,
        metavar="NAME=VALUE",
        help="A further argument of the pipeline, such as num_frames=8. Repeatable.",
    ),
    click.option("--inference-steps", type=int, hidden=True),  # until 0.4
)


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a verb with the prompts themselves in place of what names them.

    Raises:
        UsageError: prompts are named in two ways, or chosen from no file.
        InvalidInputError: the file cannot be read.
    """
    given = dict(options)
    listed, negative = given.pop("prompt"), given.pop("negative_prompt")
    file, count, seed = (given.pop(name) for name in ("prompts", "prompt_count", "prompt_seed"))
    if listed and file:
        raise UsageError("--prompt and --prompts both name prompts: give one of them")
    if file is None and (count, seed) != (None, None):
        raise UsageError("--prompt-count and --prompt-seed choose from a file: name it with --prompts")
    if file is not None:
        from qdeploy.model.prompts import read_prompts

        listed = read_prompts(file, count, seed)
    if given["inference_steps"] is not None:
        say(
            "--inference-steps is now called --steps, and what was called --steps is --keep: the old words go with "
            "the next version"
        )
    arguments = dict(_argument(text) for text in given.pop("pipeline_arg"))
    return {
        **given,
        "prompts": listed or None,
        "negative_prompts": negative or None,
        "arguments": arguments or None,
    }


def _argument(text: str) -> tuple[str, Any]:
    from qdeploy.store.bounded_yaml import parse_yaml

    name, equals, value = text.partition("=")
    try:
        if equals and name.strip():
            return name.strip(), parse_yaml(value)
    except ValueError:
        pass
    raise UsageError(f"--pipeline-arg cannot be read at {text!r}: write NAME=VALUE, as in num_frames=8")
