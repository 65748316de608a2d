"""The guides' commands do what the guides say: read from the pages, each page in a folder of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import Result

from tests.test_docs import blocks
from tools import pages

GUIDES = Path(__file__).parent.parent / "docs" / "guides"


def lines(page: str) -> list[tuple[list[str], int]]:
    """The commands of a page, and the exit code that a comment announces: 0 if none does."""
    found = []
    for block in blocks(GUIDES / f"{page}.md", "console"):
        for line in block.splitlines():
            if line.startswith("pip install"):  # is done
                continue
            code = re.search(r"# exit (\d)", line)
            found.append((shlex.split(line, comments=True)[1:], int(code[1]) if code else 0))
    return found


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
