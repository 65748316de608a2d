"""The page of reference checks lists what tests cite, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTED = re.compile(r"^\| ([A-Z]+-?\d+) \|", re.MULTILINE)
CITED = re.compile(r"\b((?:QD|TFMQ|QUEST|DGQ|QNCD)-\d+|P\d+)\b")


def listed() -> list[str]:
    return LISTED.findall((ROOT / "docs/reference-checks.md").read_text())


def cited() -> dict[str, Path]:
    return {
        found: path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path != Path(__file__)
        for found in CITED.findall(path.read_text())
    }


def test_every_cited_check_is_listed_and_every_listed_check_is_cited() -> None:
    assert len(listed()) == len(set(listed()))
    assert {name: path.name for name, path in cited().items() if name not in listed()} == {}
    assert set(listed()) - set(cited()) == set()


def test_no_check_is_cited_by_a_bare_number() -> None:
    bare = re.compile(r"\b[Tt]raps? \d|\"\"\"T\d+[.:,; ]")
    found = {path.name for path in (ROOT / "tests").rglob("*.py") if bare.search(path.read_text())}
    assert found <= {Path(__file__).name}
