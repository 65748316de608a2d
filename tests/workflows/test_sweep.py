"""A sweep is one table, whoever made its parts, and a part that was stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qdeploy.parts.plan import open_job
from qdeploy.system.errors import Planned, UsageError
from qdeploy.workflows import sweep as module
from qdeploy.workflows.sweep import sweep

FEW: dict[str, Any] = {"seeds": (0, 1), "samples": 2, "steps": 3, "keep": 2, "batch": 2}
NONE = "weights: int8\nactivations: none\nmethod: minmax\n"


@pytest.fixture
def recipes(tmp_path: Path) -> list[Path]:
    """Two recipes that look at no rows."""
    files = [tmp_path / "eight.yaml", tmp_path / "four.yaml"]
    for file, weights in zip(files, ("int8", "int4"), strict=True):
        file.write_text(NONE.replace("int8", weights))
    return files


@pytest.mark.slow
def test_parts_in_reverse_and_a_kill_end_in_the_same_table(
    ddpm: Path, recipes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = sweep(ddpm, tmp_path / "alone", recipes=recipes, **FEW)
    output = tmp_path / "shared"
    with pytest.raises(Planned) as planned:
        sweep(ddpm, output, recipes=recipes, on="plan", **FEW)
    job = open_job(planned.value.folder)
    with job.parts() as parts:
        for number in (3, 1):
            parts.keep(number, job.make)

        def stopped(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "check", stopped)
            with pytest.raises(KeyboardInterrupt):
                parts.keep(2, job.make)
    calibrated: list[Any] = []
    monkeypatch.setattr(module, "calibrate", lambda *a, **o: calibrated.append(0) or calibrate(*a, **o))
    result = sweep(ddpm, output, recipes=recipes, **FEW)
    assert len(calibrated) == 2
    for name in (module.RESULTS, module.TABLE):
        assert (output / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert result.records == alone.records
    assert [(each["run"], each["seed"]) for each in result.records] == [
        ("eight", 0), ("eight", 1), ("four", 0), ("four", 1),
    ]  # fmt: skip
    eight, four = (result.records[number]["quality"]["sqnr_db"]["median"] for number in (0, 2))
    assert eight > four + 12  # four bits fewer: about 24 dB
    text = (output / module.TABLE).read_text()
    assert "eight (2)" in text
    assert "±" in text
    assert not list(tmp_path.glob(".*.parts"))
    assert sweep(ddpm, output, recipes=recipes, **FEW).records == alone.records
    with pytest.raises(UsageError, match="holds another sweep"):
        sweep(ddpm, output, recipes=recipes[:1], **FEW)


calibrate = module.calibrate


def test_what_makes_no_sweep_is_refused(ddpm: Path, recipes: list[Path], tmp_path: Path) -> None:
    for wrong in ({"recipes": []}, {"recipes": [recipes[0]] * 2}, {"seeds": ()}, {"seeds": (1, 1)}):
        with pytest.raises(UsageError, match="each once"):
            sweep(ddpm, tmp_path / "out", **{"recipes": recipes, **FEW, **wrong})
    with pytest.raises(UsageError, match="effort"):
        sweep(ddpm, tmp_path / "out", recipes=recipes, effort="lazy", **FEW)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="already exists"):
        sweep(ddpm, tmp_path / "out", recipes=recipes, **FEW)


def test_one_effort_for_all_recipes_goes_into_the_plan(
    ddpm: Path, recipes: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(Planned) as planned:
        sweep(ddpm, tmp_path / "out", recipes=recipes, effort="fast", on="plan", **FEW)
    work = open_job(planned.value.folder).make.__self__  # type: ignore[attr-defined]
    assert {recipe.effort for recipe in work.recipes.values()} == {"fast"}
