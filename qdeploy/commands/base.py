"""What all verbs share: errors of one sentence, output as text or as one JSON object, and ``--quiet``."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qdeploy.system.errors import Planned, QDeployError
from qdeploy.system.plugins import other_module
from qdeploy.system.progress import verbosity
from qdeploy.system.suggest import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """A group whose errors are one sentence and an exit code; with ``--json`` also one JSON object on stdout."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a verb, and end the process with its exit code."""
        given = list(kwargs.get("args") or (args[0] if args and args[0] is not None else sys.argv[1:]))
        debug, output.as_json, output.printed = "--debug" in given, "--json" in given, False
        try:
            kwargs["standalone_mode"] = False
            code = super().main(*args, **kwargs)
            sys.exit(code if isinstance(code, int) else 0)
        except click.ClickException as error:
            _print_error(error.format_message(), error.exit_code)
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("stopped: run the same command again to continue", 130)
        except Planned as planned:
            value, text = {"plan": str(planned.folder), "parts": planned.count}, str(planned)
            print_result(output.as_json, lambda: value, lambda: text)
            sys.exit(0)
        except QDeployError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except Exception as error:
            if debug:
                raise
            where = other_module(error)
            what = f"error in {where}, which is not part of qdeploy" if where else "internal error"
            _fail(f"{what}: {type(error).__name__}: {error} (--debug shows where)", 1)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As of click, with the nearest verb where there is none of that name."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


class _Output:
    """What was printed so far.

    Attributes:
        as_json: whether results and errors are JSON objects on stdout.
        printed: whether one was printed: there is one for each command.
    """

    as_json = False
    printed = False


output = _Output()


def print_result(as_json: bool, value: Callable[[], Any], text: Callable[[], str]) -> None:
    """Print a result on stdout: ``value()`` as one JSON object, or ``text()`` for people."""
    click.echo(json.dumps(value()) if as_json else text())
    output.printed = True


def _print_error(message: str, code: int) -> None:
    if output.as_json and not output.printed:
        print(json.dumps({"error": " ".join(message.split()), "exit_code": code}))


def _fail(message: str, code: int) -> None:
    _print_error(message, code)
    print(f"qdeploy: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def verb(function: F) -> F:
    """The options that every verb has."""

    @functools.wraps(function)
    def run(
        *args: Any, quiet: bool, verbose: int, debug: bool, require_signature: tuple[Path, ...], **kwargs: Any
    ) -> Any:
        verbosity.level = 0 if quiet else 1 + verbose
        _silence_libraries(debug)
        if not require_signature:
            return function(*args, **kwargs)
        from qdeploy.store.signature import signature_required

        with signature_required(require_signature):
            return function(*args, **kwargs)

    for option in (
        click.option(
            "--require-signature",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="KEY",
            help="Open no artifact that the owner of this public key did not sign. Repeatable.",
        ),
        click.option("--debug", is_flag=True, help="Show tracebacks and the messages of libraries."),
        click.option("-v", "--verbose", count=True, help="Say more."),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, errors too."),
    ):
        run = option(run)
    return run  # type: ignore[return-value]


def _silence_libraries(debug: bool) -> None:
    if debug:
        return
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def report_made(
    result: Any,
    began: float,
    as_json: bool,
    more: Callable[[Any], dict[str, Any]] | None = None,
    table: Callable[[Any], str] | None = None,
) -> None:
    """Print the artifact that a verb wrote, or the estimate of a dry run.

    Args:
        result: an artifact or an estimate.
        began: when the work began, by `time.perf_counter`.
        as_json: whether to print JSON.
        more: further entries of the JSON object.
        table: what to print before the line for people.
    """
    from qdeploy.store.artifact import Artifact

    if isinstance(result, Artifact):
        summary = result.summary(time.perf_counter() - began) | (more(result) if more else {})
        text = f"{table(result)}\n" if table else ""
        text += (
            f"{summary['kind']} {summary['path']} ({summary['sha256'][:12]}) in {summary['seconds']:.1f} s"
        )
    else:
        summary = {"estimate": {"seconds": round(result.seconds, 3), "bytes": int(result.bytes)}}
        text = f"estimated: {result}"
    print_result(as_json, lambda: summary, lambda: text)
