"""Every row of ``docs/flags.md`` is run: its command is parsed, and what it asks for resolved, short of a model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest

from qdeploy.calibrate.published.layouts import find_layout
from qdeploy.cli import main
from qdeploy.model.sampling import SAMPLING
from qdeploy.model.schedulers import scheduler_for
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.sampling.correct import read_choice
from qdeploy.system.errors import QDeployError
from qdeploy.workflows.import_checkpoint import parse_timesteps

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
SAMPLED = ("steps", "scheduler", "guidance", "prompts", "eta", "seed", "batch", "timesteps")


def rows() -> list[tuple[str, str]]:
    found = re.findall(r"^\| (?!their flag|---)(.+?) \| (.+?) \|", PAGE.read_text(), flags=re.MULTILINE)
    return [(theirs, ours) for theirs, ours in found if not theirs.startswith("-")]


def sampled(options: dict[str, Any]) -> None:
    """The scheduler that a pipeline would sample with."""
    chosen = SAMPLING.changed({name: value for name, value in options.items() if name in SAMPLED})
    scheduler_for(chosen, diffusers.DDIMScheduler()).set_timesteps(chosen.steps)
    read_choice(options.get("correction", "none"))


def calibrated(options: dict[str, Any]) -> None:
    options = {
        name: value for name, value in options.items() if name not in ("output", "calibration", "max_memory")
    }
    resolve_recipe(options.pop("recipe", None), **options)


def imported(options: dict[str, Any]) -> None:
    find_layout(options["method"])
    parse_timesteps(options.get("timesteps"))


RESOLVED = {
    "qdeploy.calibration_set.collect.collect": sampled,
    "qdeploy.calibration_set.importers.import_qdiffusion": lambda options: None,
    "qdeploy.sampling.sample.sample": sampled,
    "qdeploy.evaluate.check.check": lambda options: None,
    "qdeploy.workflows.calibrate.calibrate": calibrated,
    "qdeploy.workflows.import_checkpoint.import_checkpoint": imported,
    "qdeploy.engines.build.build_engine": lambda options: None,
}


class Reached(Exception):
    """The command was understood."""


@pytest.fixture
def resolving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What verbs call resolves its options and stops; the files that rows name are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val_ann.txt").write_text("a cat\n")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    captions = [{"image_id": number, "id": number, "caption": "a cat"} for number in range(128)]
    (tmp_path / "captions_train.json").write_text(json.dumps({"annotations": captions}))
    for name, resolve in RESOLVED.items():

        def call(*arguments: Any, resolve: Any = resolve, **options: Any) -> None:
            given = {
                key: value
                for key, value in options.items()
                if key not in ("overwrite", "device", "dry_run", "data_parallel")
            }
            resolve(given)
            raise Reached

        monkeypatch.setattr(name, call)


def test_the_tables_are_there() -> None:
    assert len(rows()) > 90
    assert {"QNCD", "DGQ", "QuEST", "TFMQ-DM", "Q-Diffusion"} <= set(
        re.findall(r"^## (\S+)", PAGE.read_text(), re.M)
    )


@pytest.mark.parametrize(("theirs", "ours"), rows())
@pytest.mark.usefixtures("resolving")
def test_every_row_is_understood(theirs: str, ours: str) -> None:
    if ours == "\N{EN DASH}":
        return
    _, *words = shlex.split(re.fullmatch(r"`(qdeploy .+)`", ours)[1])  # type: ignore[index]
    command, context = main.commands[words[0]], None
    try:
        context = command.make_context(words[0], words[1:])
        context.invoke(command.callback, **context.params)  # type: ignore[arg-type]
    except Reached:
        return
    except QDeployError as error:
        pytest.fail(f"{theirs}: {error}")
    pytest.fail(f"{theirs}: nothing was called")
