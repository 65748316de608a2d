"""The lock holds the versions that the constraints name, each with hashes, and names no place to get them from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(
    r"^([A-Za-z0-9][\w.-]*)==([^ ;\\]+)[^\\\n]*((?: \\\n    --hash=sha256:[0-9a-f]{64})+)", re.MULTILINE
)


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text()
    return {canonicalize_name(name): version for name, version, _ in ENTRY.findall(text)}


def test_every_line_is_a_version_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not [line for line in ENTRY.sub("", text).splitlines() if line and not line.startswith("#")]
    assert "://" not in text
    assert "--index" not in text


def test_versions_are_those_that_were_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if "==" in line)
    found = locked()
    assert {
        name: found[canonicalize_name(name)] for name in constraints if canonicalize_name(name) in found
    } == {name: version for name, version in constraints.items() if canonicalize_name(name) in found}


def test_whatever_the_package_asks_for_is_locked_within_its_range() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = locked()
    for line in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        needed = Requirement(line)
        assert Version(found[canonicalize_name(needed.name)]) in needed.specifier, line
