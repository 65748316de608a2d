"""The table of `benchmarks.methods`: seeds of several runs together, shares with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.methods_report import joined, read_results, result_of, table, write_results


def record(run: str, seed: int, median: float, shape: float | None = None) -> dict[str, Any]:
    """What `benchmarks.methods` knows of one calibration."""
    attributes = {"shape": {"accuracy": shape, "of_the_reference": 0.9, "count": 40}} if shape else {}
    quality = {"sqnr_db": {"median": median, "worst": median - 10}, "attributes": attributes}
    return {"run": run, "seed": seed, "engine_mb": 3.8, "quality": quality, "minutes": 1.0}


def test_seeds_of_several_runs_are_one_row(tmp_path: Path) -> None:
    first = [result_of(record("W4A8 a", 0, 20.0)), result_of(record("W4A8 b", 0, 30.0))]
    write_results(tmp_path / "first", first, "a note")
    again = [result_of(record("W4A8 a", 1, 22.0)), result_of(record("W4A8 b", 0, 31.0))]
    results = joined([*read_results([tmp_path / "first" / "results.json"]), *again])
    assert [(r["run"], r["seed"]) for r in results] == [("W4A8 a", 0), ("W4A8 a", 1), ("W4A8 b", 0)]
    shown = table(results)
    rows = shown.rows
    assert shown.columns == ["model", "SQNR dB, median", "worst", "minutes", "engine MB", "engine"]
    assert rows[1][:2] == ["W4A8 a (2)", "21.0 ± 1.4"]
    assert rows[2][:2] == ["W4A8 b (1)", "31.0"], "the later run counts"
    assert (tmp_path / "first" / "methods.png").is_file()


def test_a_share_is_as_sure_as_its_pictures_are_many() -> None:
    """More calibrations on the same prompts do not make it surer."""
    one = [result_of(record("W8A8 a", 0, 40.0, 0.95))]
    three = [result_of(record("W8A8 a", seed, 40.0, 0.95)) for seed in range(3)]
    cells = [table(results).rows[1][3] for results in (one, three)]
    assert cells[0] == cells[1] == "0.95 (0.83 to 0.99)"
    assert table(one).rows[0][3] == "0.90 (0.77 to 0.96)", "the full-precision model"
