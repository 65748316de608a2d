"""The demo's pieces: stages that are remembered, a table that tells what it has; and the whole on a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdeploy.evaluate.cached_json import cached_result
from qdeploy.evaluate.summary import DemoResult, engine_table, summary_notes
from qdeploy.model.folder import open_model
from qdeploy.recipe.resolve import presets
from qdeploy.system.progress import verbosity
from qdeploy.system.tables import MISSING
from qdeploy.workflows.demo import DemoRun, demo, variants
from tests.helpers import pretend_processor


@pytest.fixture
def work(tmp_path: Path) -> DemoRun:
    return DemoRun(tmp_path, open_model("digits"), "openvino", 4, 3)


def test_every_variant_is_a_preset() -> None:
    assert {variant.recipe for variant in variants().values()} <= presets().keys()


@pytest.mark.parametrize(("flags", "weights"), [("avx2", "int7"), ("avx2 avx512_vnni", None)])
def test_weights_are_those_that_run_in_int8_on_this_processor(
    flags: str, weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_processor(monkeypatch, tmp_path, flags)
    assert [variant.weights for variant in variants().values()] == [weights, None]
    assert ("W7A8" in variants()["w8a8"].title) == (weights == "int7")


def test_a_result_is_remembered_until_what_it_was_made_from_changes(tmp_path: Path) -> None:
    runs: list[int] = []

    def measure() -> dict[str, Any]:
        runs.append(1)
        return {"run": len(runs)}

    file = tmp_path / "measured" / "x.json"
    assert cached_result(file, ["a"], measure) == {"run": 1}
    assert cached_result(file, ["a"], measure) == {"run": 1}
    assert cached_result(file, ["b"], measure) == {"run": 2}


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"key": 1'])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "x.json").write_text(damage)
    assert cached_result(tmp_path / "x.json", 1, lambda: {"value": 2}) == {"value": 2}


def test_a_stage_is_one_line_with_its_time(work: DemoRun, capsys: pytest.CaptureFixture[str]) -> None:
    from qdeploy.system.progress import say

    assert work.stage("collect", lambda: say("details") or 7) == 7
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].split()[0] == "collect"
    assert work.stages["collect"] >= 0
    assert verbosity.level == 1


def test_a_stage_that_fails_leaves_the_verbosity_as_it_was(work: DemoRun) -> None:
    with pytest.raises(ZeroDivisionError):
        work.stage("collect", lambda: 1 // 0)
    assert verbosity.level == 1


def check_of(median: float, passed: bool = True) -> dict[str, Any]:
    return {
        "passed": passed,
        "failures": [] if passed else ["the parity in dB is 3.00, below 40.00"],
        "parity": {"sqnr_db": 44.0},
        "quality": {
            "samples": 8,
            "inference_steps": 5,
            "sqnr_db": {"median": median, "worst": 10.0},
            "psnr_db": 30.0,
            "fd_local": {"reference": 5.5, "subject": 6.5, "count": 8},
        },
    }


def result_of(name: str, batch: int) -> dict[str, Any]:
    ms = {"median": float(batch), "p95": 9.0}
    return {
        "name": name,
        "sha256": name,
        "batch": batch,
        "ms": ms,
        "size_mb": 1.0,
        "int8_mac_share": 0.97,
    }


def test_the_table_has_a_row_for_each_engine() -> None:
    names = ["f32", "bf16", "w8a8"]
    engines: Any = {name: SimpleNamespace(sha256=name) for name in names}
    checks = {"bf16": check_of(50), "w8a8": check_of(45, passed=False)}
    speed: dict[str, Any] = {
        "results": [result_of(name, batch) for batch in (1, 16) for name in names],
        "ratios": {
            "w8a8 vs f32, batch 1": 9.0,
            "w8a8 vs f32, batch 16": 1.5,
            "w8a8 vs bf16, batch 16": 1.25,
        },
        "machine": {"cpu": "abacus", "cores": 2},
        "threads": 1,
    }
    table = engine_table(engines, {name: name.upper() for name in names}, checks, speed, 16)
    assert "FD-local, 8 images" in table.columns
    shown = [[cell.text for cell in row] for row in table.cells]
    by_engine = {row[0]: dict(zip(table.columns, row, strict=True)) for row in shown}
    assert list(by_engine) == ["F32", "BF16", "W8A8"]
    assert by_engine["F32"]["FD-local, 8 images"] == "5.50"
    assert by_engine["F32"]["SQNR dB, median"] == by_engine["F32"]["parity dB"] == MISSING
    assert by_engine["W8A8"]["ms per step, 16 images"] == "16.00"
    assert by_engine["W8A8"]["vs f32"] == "1.50x"
    assert by_engine["W8A8"]["vs bf16"] == "1.25x"
    notes = summary_notes(checks, speed)
    assert "abacus" in notes[0]
    assert "check w8a8: the parity in dB is 3.00, below 40.00" in notes
    result = DemoResult(Path("demo"), table, {"collect": 1.0}, checks, speed, notes)
    assert not result.passed
    assert result.to_json()["seconds"] == 1.0
    assert "W8A8" in result.table
    assert result.markdown().startswith("| engine |")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_ends_with_a_row_for_each_engine(ddpm: Path, tmp_path: Path) -> None:
    made = demo(tmp_path / "demo", model=ddpm, backend="openvino", samples=2, rounds=1)
    rows = [line.split("|")[1].strip() for line in made.markdown().splitlines()[2:] if line.startswith("|")]
    assert rows[0] == "full precision"
    assert rows[-2:] == ["8-bit (W8A8)", "4-bit (W4A8)"]
    assert (tmp_path / "demo" / "report.html").is_file()
