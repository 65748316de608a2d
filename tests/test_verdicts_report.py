"""The tables of `benchmarks.verdicts` and `benchmarks.oracles`, and that claims name recipes that there are."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.oracles import report as oracles
from benchmarks.verdicts import FOLDER, NAMES
from benchmarks.verdicts_report import CLAIMS, table
from qdeploy.recipe.resolve import resolve_recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_claims_recipe_resolves(name: str) -> None:
    assert resolve_recipe(FOLDER / f"{name}.yaml").method


def record(recipe: str, seed: int, median: float) -> dict[str, Any]:
    return {"model": "digits", "recipe": recipe, "seed": seed, "median": median, "pooled": 1.0, "worst": 0.0}


def test_gains_are_paired_by_calibration_with_students_interval() -> None:
    claim = CLAIMS[0]
    records = [record(claim.without, seed, 10.0 + seed) for seed in range(3)]
    records += [record(claim.with_it, seed, 12.0 + seed + 0.1 * seed) for seed in range(3)]
    (row,) = table(records).rows
    assert row[3] == "3"
    # Gains of 2.0, 2.1 and 2.2 dB: deviation 0.1, t = 4.30, so ± 0.25; the scatter of calibrations drops out.
    assert row[6] == "+2.1 ± 0.2"
    assert row[7] == "+0.0 ± 0.0"


def test_a_recipe_without_its_partner_makes_no_row() -> None:
    assert not table([record(CLAIMS[0].without, 0, 10.0)]).rows


def test_ours_and_theirs_are_rows_of_their_own() -> None:
    figures = {"median": 40.0, "pooled": 30.0, "worst": 16.0}
    common = {
        "method": "qdiffusion",
        "bits": "w4a8",
        "coverage": "portable",
        "steps": [500, 100],
        "cpu_seconds": 9,
    }
    records: list[dict[str, Any]] = [
        {**common, "who": who, "seed": seed, "w4a8": {**figures, "median": 40.0 + seed}}
        for who in ("ours", "theirs")
        for seed in (0, 1)
    ]
    records[-1]["imported"] = {**figures, "worst": 120.0}
    records.append({**records[0], "who": "theirs", "bits": "w8a8", "w8a8": figures, "refused": "no place"})
    *rows, refused = oracles.table(records).rows
    assert refused[-1] == "refused"
    assert [row[5] for row in rows] == ["qdeploy", "the authors'"]
    assert rows[0][7] == "40.5 (40.0 to 41.0)"
    assert [row[-1] for row in rows] == ["", "120"]
