"""What the documents show is what the program takes."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from qdeploy.cli import main
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import check_stages, find_method
from qdeploy.system.errors import UsageError
from tests.plugins import install
from tools import tree, try_pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    found = [line for page in PAGES for line, _ in try_pages.commands(page)]
    return [line for line in found if line.startswith("qdeploy ")]


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


@pytest.fixture
def worked_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tests of CONTRIBUTING's method, metric and pass, which are in an installed package of their own."""
    page = ROOT / "CONTRIBUTING.md"
    method, metric, rewrite, test = blocks(page, "python")
    (project,) = blocks(page, "toml")
    groups = re.findall(r"entry-points\.\"([\w.]+)\"\]\n(\w+) = \"([\w.]+)\"", project)
    entries = {group: {name: value} for group, name, value in groups}
    assert entries.keys() == {"qdeploy.methods", "qdeploy.metrics", "qdeploy.passes"}
    install(tmp_path, monkeypatch, entries, percentile=method, brightness=metric, doubled=rewrite)
    return test


def test_the_worked_package_in_contributing_is_found_and_passes_its_tests(
    worked_package: str, tmp_path: Path, qdeploy: Callable[..., Result]
) -> None:
    """Three files and their entry points: nothing else is written, and every part of the program knows them."""
    assert check_stages(find_method("percentile").stages)
    assert resolve_recipe(method="percentile").stages[2].options == {"factor": 1.1}
    shown = qdeploy("methods")
    assert shown.exit_code == 0
    assert {"percentile", "widen", "brightness", "Doubled"} <= set(re.findall(r"\w+", shown.stdout))
    for name in ("brightness", "my_package.doubled.Doubled"):
        assert qdeploy("methods", name).exit_code == 0
    namespace: dict[str, Any] = {}
    exec(worked_package, namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 3
    for number, test in enumerate(tests):
        test(tmp_path / str(number))


def test_without_its_file_the_worked_method_is_unknown() -> None:
    """So the test above shows that the file alone makes it known."""
    with pytest.raises(UsageError, match="unknown method 'percentile'"):
        find_method("percentile")


def test_the_design_shows_the_tree_as_it_is() -> None:
    page = tree.PAGE.read_text()
    assert tree.written(page) == page, "the package's tree has changed: python tools/tree.py"


def test_a_new_file_is_missed_in_the_design(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "qdeploy" / "store", tmp_path / "qdeploy" / "store")
    (tmp_path / "qdeploy" / "__init__.py").write_text('"""A package."""')
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    before = tree.tree()
    (tmp_path / "qdeploy" / "store" / "attic.py").write_text('"""What nobody needs."""')
    assert "attic" in tree.tree()
    assert "attic" not in before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
