"""The report of a lint run: findings, as JSON, as lines for people, and as the facts of a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qdeploy.export.lint.rule import SEVERITIES, E
from qdeploy.export.lint.scope import Scope
from qdeploy.export.lint.verdicts import INFERRED, READ
from qdeploy.export.lint.waivers import WAIVERS
from qdeploy.store.facts import LintFacts

_SHOWN = 3  # nodes that a line names


@dataclass(frozen=True)
class Finding:
    """One place where a rule fires."""

    rule: str
    severity: str
    node: str
    message: str
    verified: bool
    waived: str | None = None
    evidence: str = READ


@dataclass(frozen=True)
class LintReport:
    """The findings in a graph."""

    path: str
    scope: Scope
    findings: tuple[Finding, ...]
    macs: dict[str, Any]
    fixed: dict[str, int]
    output: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Findings by severity; what is waived does not count."""
        counted = Counter(finding.severity for finding in self.findings if finding.waived is None)
        return {severity: counted[severity] for severity in SEVERITIES}

    @property
    def passed(self) -> bool:
        """Whether no engine would reject the graph."""
        return not self.counts[E]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        result = {
            "path": self.path,
            "target": self.scope.target,
            "engine": self.scope.engine,
            "scope": {
                "tensorrt": _dots(self.scope.tensorrt),
                "compute_capability": _dots(self.scope.compute_capability),
                "profile": self.scope.profile,
            },
            "findings": [asdict(finding) for finding in self.findings],
            "counts": self.counts,
            "macs": self.macs,
        }
        return result | ({"output": self.output, "fixed": self.fixed} if self.output else {})

    def summary(self) -> LintFacts:
        """The part that a bundle stores: findings by severity, each rule's number of them, shares of MACs."""
        by_rule = {
            waived: Counter(finding.rule for finding in self.findings if bool(finding.waived) is waived)
            for waived in (False, True)
        }
        return LintFacts(
            counts=self.counts,
            rules=dict(sorted(by_rule[False].items())),
            waived=dict(sorted(by_rule[True].items())),
            shares=self.macs["shares"],
        )

    def table(self, every: bool = False) -> str:
        """For people: one line for each rule with the number of places and the first of them, or every place."""
        lines = _places(self.findings) if every else _by_rule(self.findings)
        if self.output:
            fixed_rules = ", ".join(f"{rule} ({count})" for rule, count in self.fixed.items()) or "nothing"
            lines.append(f"fixed {fixed_rules}: {self.output}")
        waived = Counter(finding.rule for finding in self.findings if finding.waived)
        lines += [f"{rule} is waived {count} times: {WAIVERS[rule]}" for rule, count in waived.items()]
        counted = ", ".join(f"{count} {severity}" for severity, count in self.counts.items())
        lines.append(f"{self.path}: {counted}" + (f", {waived.total()} waived" if waived else ""))
        return "\n".join(lines)


def _places(findings: Sequence[Finding]) -> list[str]:
    """One line for each place."""
    return [
        f"{finding.severity} {finding.rule} {finding.node}: {finding.message}{_doubt(finding)}"
        for finding in findings
        if finding.waived is None
    ]


def _by_rule(findings: Sequence[Finding]) -> list[str]:
    """One line for each rule and severity: how many places, the first of them, and what to do there."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        if finding.waived is None:
            about = (
                finding.message if finding.node == "graph" else ""
            )  # each of these says something of its own
            groups.setdefault((finding.severity, finding.rule, about), []).append(finding)
    lines = []
    for (level, rule, _), group in groups.items():
        first = group[0]
        if len(group) == 1:
            lines += _places(group)
            continue
        named = ", ".join(finding.node for finding in group[:_SHOWN])
        rest = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        lines.append(f"{level} {rule} at {len(group)} places: {first.message}{_doubt(first)}; {named}{rest}")
    return lines


def _doubt(finding: Finding) -> str:
    return " (unverified on hardware)" if finding.evidence == INFERRED else ""


def _dots(version: tuple[int, int] | None) -> str | None:
    return None if version is None else ".".join(map(str, version))
