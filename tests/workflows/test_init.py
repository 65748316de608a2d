"""``init``: a recipe that `calibrate` takes, from a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.commands import information
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.which import PROCESSORS, WISHES

Run = Callable[..., Result]


@pytest.mark.parametrize("model", ["digits", "digits-dit"])
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("wish", WISHES)
def test_a_recipe_is_one_that_calibrate_takes(
    qdeploy: Run, tmp_path: Path, model: str, processor: str, wish: str
) -> None:
    file = tmp_path / "recipe.yaml"
    result = qdeploy("init", model, "-o", file, "--for", processor, "--wish", wish, "--json")
    if result.exit_code:
        assert "no preset is measured" in json.loads(result.stdout)["error"]
        assert not file.exists()
        return
    made = json.loads(result.stdout)
    recipe = resolve_recipe(file)
    assert recipe.target in {"tensorrt"} if processor in ("tensorrt", "rtx") else {"openvino", "portable"}
    assert recipe.method == resolve_recipe(made["preset"]).method
    assert file.read_text().startswith(f"# {made['preset']}")


def test_questions_are_asked_where_somebody_can_answer(
    qdeploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        @staticmethod
        def isatty() -> bool:
            return True

    answers = iter(["digits", "cpu", "quality"])
    monkeypatch.setattr(information.sys, "stdin", Terminal())  # type: ignore[attr-defined]
    monkeypatch.setattr(information.click, "prompt", lambda *a, **k: next(answers))  # type: ignore[attr-defined]
    made = information.ask(None, {"processor": None, "wish": None})
    assert made == ("digits", {"processor": "cpu", "wish": "quality"})


def test_a_file_is_not_replaced_and_nobody_is_asked_in_a_pipe(qdeploy: Run, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("mine")
    result = qdeploy("init", "digits", "-o", file)
    assert (result.exit_code, file.read_text()) == (2, "mine")
    assert "--overwrite" in result.stderr
    assert qdeploy("init").exit_code == 2
    refused = qdeploy("init", "digits", "-o", tmp_path / "new.yaml", "--for", "gpu1")
    assert refused.exit_code == 2
    assert not (tmp_path / "new.yaml").exists()
