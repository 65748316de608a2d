"""What the documents show is what the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from qdeploy.calibrate.methods import check_stages
from qdeploy.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line.split("#")[0].strip() for line in lines if line.startswith("qdeploy ")]


def test_the_documents_show_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_can_be_parsed(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    command = main.commands[verb]
    assert isinstance(command, click.Command)
    command.make_context(verb, arguments)


def test_python_shown_uses_names_that_exist() -> None:
    import qdeploy

    shown = {
        name
        for page in PAGES
        for block in blocks(page, "python")
        for name in re.findall(r"qdeploy\.(\w+)\(", block)
    }
    assert shown >= {"collect", "calibrate", "export", "build_engine", "load_engine"}
    assert all(callable(getattr(qdeploy, name)) for name in shown)


def test_the_worked_method_in_contributing_is_one() -> None:
    (block,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    namespace: dict[str, object] = {}
    exec(block, namespace)
    method = namespace["METHOD"]
    assert check_stages(method.stages)  # type: ignore[attr-defined]
