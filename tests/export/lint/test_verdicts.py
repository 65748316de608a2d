"""One rule, two engines: what TensorRT for RTX makes of the graphs that TensorRT's rules are about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.export.lint.rule import rules
from qdeploy.export.lint.run import lint
from qdeploy.export.lint.verdicts import ENGINES, RTX, RUN, verdict
from qdeploy.system.errors import UsageError
from tests.export.lint.fixtures import CASES


def severities(rule: str, folder: Path, which: str = "failing", engine: str = RTX) -> set[str]:
    case = CASES[rule]
    report = lint(case.write(getattr(case, which), folder / f"{which}.onnx"), engine=engine, **case.options)
    return {finding.severity for finding in report.findings if finding.rule == rule}


@pytest.mark.parametrize(
    ("rule", "tensorrt", "rtx"),
    [
        ("TRT005", {"W"}, {"E"}),  # a computed scale crashes the builder
        ("TRT015", {"W"}, {"E"}),  # an int4 convolution with int8 inputs is refused
        ("TRT007", {"E"}, {"W"}),
        ("TRT021", {"E"}, {"W"}),
        ("TRT010", {"E"}, set()),
        ("TRT020", {"E"}, set()),
        ("TRT014", {"W"}, set()),
        ("TRT023", {"W"}, set()),
        ("TRT047", {"E"}, {"E"}),
    ],
)
def test_an_engines_error_can_be_the_others_normal_case(
    rule: str, tensorrt: set[str], rtx: set[str], tmp_path: Path
) -> None:
    assert severities(rule, tmp_path, engine="tensorrt") == tensorrt
    assert severities(rule, tmp_path) == rtx


def test_every_verdict_says_how_it_is_known() -> None:
    words = {(verdict(rule, engine).severity, verdict(rule, engine).evidence) for rule in rules().values()
             for engine in ENGINES}  # fmt: skip
    assert {evidence for _, evidence in words} == {"run", "read", "inferred"}
    ran = [rule for rule in rules().values() if verdict(rule, RTX).evidence == RUN]
    assert len(ran) > 25
    assert all(verdict(rule, "tensorrt").evidence != RUN for rule in ran if rule.backend == "tensorrt")


def test_findings_are_one_line_for_each_rule_with_the_count_and_the_first_nodes(tmp_path: Path) -> None:
    case = CASES["TRT003"]
    model = case.failing
    path = case.write(model, tmp_path / "model.onnx")
    report = lint(path)
    assert report.table().splitlines()[:-1] == report.table(every=True).splitlines()[:-1]  # one place each
    found = [finding for finding in report.findings if finding.rule == "TRT003"] * 5
    many = replace(report, findings=tuple(found))
    (line, _) = many.table().splitlines()
    assert line.startswith("W TRT003 at 5 places: ")
    assert line.endswith("and 2 more")
    assert len(many.table(every=True).splitlines()) == 6


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    case = CASES["TRT003"]
    with pytest.raises(UsageError, match="unknown engine 'tensorrt-lite'"):
        lint(case.write(case.twin, tmp_path / "model.onnx"), engine="tensorrt-lite")
