"""The table of rules: ``python -m qdeploy.export.lint.table docs/lint.md`` rewrites it in that page."""

from __future__ import annotations

import sys
from pathlib import Path

from qdeploy.export.lint.fixes import fixes
from qdeploy.export.lint.rule import rules
from qdeploy.export.lint.verdicts import ENGINES, TENSORRT, Verdict, verdict
from qdeploy.export.lint.waivers import WAIVERS

BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"
HEADER = (
    "rule", "what a graph has to be like", "otherwise", "holds for", "TensorRT 10, 11", "TensorRT for RTX 1.7",
    "source", "`--fix`",
)  # fmt: skip


def rules_table() -> str:
    """All rules in Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER)]
    for rule in rules().values():
        source = rule.source + ("" if rule.verified else ", unverified on hardware" if rule.inferred else "")
        fixed = "where exact" if rule.id in fixes() else ""
        engines = (
            [_column(verdict(rule, engine)) for engine in ENGINES]
            if rule.backend == TENSORRT
            else [f"{rule.severity}, for OpenVINO", ""]
        )
        lines.append((rule.id, rule.what, rule.why, rule.since, *engines, source, fixed))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _column(held: Verdict) -> str:
    """An engine's word on a rule: severity, how it is known, and what differs."""
    return f"{held.severity or 'no finding'}, {held.evidence}" + (f": {held.note}" if held.note else "")


def waivers_list() -> str:
    """The rules that are waived for qdeploy's own exports."""
    return "\n".join(f"- **{rule}**: {why}." for rule, why in WAIVERS.items())


def in_step(text: str) -> str:
    """A page with the part between its marks rewritten."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{rules_table()}\n\nWaived for qdeploy's own exports:\n\n{waivers_list()}\n{END}{tail}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(in_step(page.read_text()))
