"""The guides' commands do what the guides say: read from the pages, each page in a folder of its own."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import Result

from tools import pages, try_pages

GUIDES = try_pages.GUIDES


def lines(page: str) -> list[tuple[list[str], int]]:
    """The commands of a page, those that install excepted, and the exit code that a comment announces."""
    found = try_pages.commands(GUIDES / f"{page}.md")
    return [(shlex.split(line)[1:], code) for line, code in found if line.startswith("qdeploy ")]


@pytest.mark.slow
@pytest.mark.field
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted(page.stem for page in GUIDES.glob("*.md")))
def test_a_guide_does_what_it_says(
    page: str, qdeploy: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "rtx" and find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx")
    monkeypatch.chdir(tmp_path)
    for arguments, code in lines(page):
        result = qdeploy(*arguments)
        assert result.exit_code == code, f"qdeploy {shlex.join(arguments)}\n{result.stderr}"


def test_made_pages_are_as_their_sources() -> None:
    stale = [str(file) for file, text in pages.pages().items() if file.read_text(encoding="utf-8") != text]
    assert not stale, f"python tools/pages.py: {stale}"
