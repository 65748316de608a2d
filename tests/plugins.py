"""Distributions made for one test, installed as pip does: a package and its ``.dist-info`` in sys.path."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qdeploy.system import plugins


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: Mapping[str, Mapping[str, str]],
    name: str = "my_package",
    **modules: str,
) -> None:
    """Install a package of some modules that registers some entry points, until the test ends.

    Args:
        folder: where site-packages shall be.
        monkeypatch: of the test.
        entries: values of entry points by group and name.
        name: of the distribution and of its package.
        modules: their source by name.
    """
    site = folder / f"{name}-site-packages"
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("")
    for module, source in modules.items():
        (site / name / f"{module}.py").write_text(source)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, listed in entries.items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in listed.items()))
        )
    )
    monkeypatch.syspath_prepend(site)
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(plugins, "registered", getattr(plugins.registered, "__wrapped__", plugins.registered))
