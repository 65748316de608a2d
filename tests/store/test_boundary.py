"""The sources have no other way to an artifact's facts and files than the store's typed classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qdeploy

ROOT = Path(qdeploy.__file__).parent
SOURCES = [file for file in sorted(ROOT.rglob("*.py")) if file.relative_to(ROOT).parts[0] != "store"]


def violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="facts" | "manifest")):
                yield node.lineno, "facts and manifests are typed: use their attributes"
            case ast.Subscript(value=ast.Name(id="facts" | "manifest")):
                yield node.lineno, "facts and manifests are typed: use their attributes"
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="facts" | "manifest"), attr="get")):
                yield node.lineno, "facts and manifests are typed: use their attributes"
            case ast.Call(
                func=ast.Name(id="Artifact" | "Checkpoint" | "Bundle" | "EngineFolder" | "Samples")
            ):
                yield node.lineno, "artifacts are opened or finished, never put together"
            case ast.Constant(value="qdeploy.json"):
                yield node.lineno, "manifests are read by the store"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_artifacts_are_reached_through_the_store_alone(file: Path) -> None:
    assert list(violations(ast.parse(file.read_text()))) == []


def test_the_walk_finds_what_it_looks_for() -> None:
    planted = 'x.facts["a"]; facts["a"]; x.manifest.get("b"); Artifact(p, {}); open("qdeploy.json")'
    assert len(list(violations(ast.parse(planted)))) == 5
