"""Each rule fires on the smallest graph that breaks it, and is silent on the mended twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qdeploy.export.lint.fixes import fixes
from qdeploy.export.lint.report import LintReport
from qdeploy.export.lint.rule import rules
from qdeploy.export.lint.run import lint
from tests.export.lint.fixtures import CASES, Case, run


def fired(report: LintReport, *severities: str) -> set[str]:
    return {f.rule for f in report.findings if f.severity in (severities or ("E", "W", "I"))}


@pytest.fixture(params=CASES)
def rule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(rule: str) -> Case:
    return CASES[rule]


@pytest.fixture
def failing(case: Case, tmp_path: Path) -> Path:
    return case.write(case.failing, tmp_path / "failing.onnx")


@pytest.fixture
def twin(case: Case, tmp_path: Path) -> Path:
    return case.write(case.twin, tmp_path / "twin.onnx")


def test_every_rule_has_a_fixture() -> None:
    assert CASES.keys() == rules().keys()
    assert len([rule for rule in rules() if rule.startswith("TRT")]) == 48


def test_it_fires(rule: str, case: Case, failing: Path) -> None:
    report = lint(failing, **case.options)
    assert rule in fired(report)
    mine = [finding for finding in report.findings if finding.rule == rule]
    assert all(finding.node and finding.message for finding in mine)
    if rules()[rule].severity != "I":
        assert any(finding.severity in ("E", "W") for finding in mine)


def test_the_twin_is_clean(case: Case, twin: Path) -> None:
    onnx.checker.check_model(twin, full_check=True)
    assert not fired(lint(twin, **case.options), "E", "W")


def test_onnx_runtime_runs_them(case: Case, failing: Path, twin: Path) -> None:
    """What fires is no broken graph: it runs elsewhere."""
    assert all(np.isfinite(output.astype(np.float32)).all() for output in run(twin))
    if case.lame:
        with pytest.raises(Exception):  # noqa: B017, PT011 - onnxruntime's errors have no common base
            run(failing)
    else:
        run(failing)


@pytest.mark.parametrize("rule", fixes())
def test_a_fix_cleans_and_changes_nothing(rule: str, tmp_path: Path) -> None:
    case = CASES[rule]
    failing = case.write(case.failing, tmp_path / "failing.onnx")
    report = lint(failing, fix=tmp_path / "fixed.onnx", **case.options)
    assert rule in report.fixed
    assert not fired(report, "E", "W")
    for before, after in zip(run(failing), run(tmp_path / "fixed.onnx"), strict=True):
        assert np.array_equal(before, after)


def test_a_fix_leaves_a_clean_graph_alone(case: Case, twin: Path, tmp_path: Path) -> None:
    if case.spoil:
        pytest.skip("the fixed graph is written with its weights inside")
    report = lint(twin, fix=tmp_path / "fixed.onnx", **case.options)
    assert not report.fixed
    assert len(onnx.load(tmp_path / "fixed.onnx").graph.node) == len(case.twin.graph.node)
