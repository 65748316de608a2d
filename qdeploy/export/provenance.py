"""Metadata inside a graph, for use without its folder, and the findings of lint on it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qdeploy.export.lint.run import lint
from qdeploy.store.artifact import Bundle
from qdeploy.store.builder import Draft
from qdeploy.store.facts import BundleFacts, LintFacts
from qdeploy.system.progress import say
from qdeploy.version import __version__


def describe(graph: ir.Model, draft: Draft[Bundle], facts: BundleFacts) -> None:
    """Write the provenance into the graph itself, so that it survives without the folder."""
    graph.producer_name, graph.producer_version = "qdeploy", __version__
    graph.metadata_props["qdeploy.version"] = __version__
    graph.metadata_props["qdeploy.precision"] = facts.precision
    graph.metadata_props["qdeploy.target"] = facts.target
    if draft.recipe is not None:
        graph.metadata_props["qdeploy.method"] = str(draft.recipe["method"])
        graph.metadata_props["qdeploy.seed"] = str(draft.seed)
    for name, digest in draft.made_from.items():
        graph.metadata_props[f"qdeploy.made_from.{name}"] = digest


def findings(file: Path) -> LintFacts:
    """The findings of the lint rules of the target's engines, for the bundle's facts."""
    report = lint(file)
    if found := report.counts["E"] + report.counts["W"]:
        say(
            f"warning: {found} findings of `qdeploy lint` in what was exported: lint the bundle, and report it"
        )
    return report.summary()
