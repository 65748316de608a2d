"""An evaluation that is stopped goes on, and processes that share it find what one alone finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdeploy.evaluate import shared_work
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.evaluate.quality import QualityPlan, Trajectories, measure_quality
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import CHECKING
from qdeploy.quant.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


def test_a_stopped_evaluation_goes_on_where_it_was(
    way: Any, small: QualityPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path))
    model, subject = open_model(way.model), load_checkpoint(way.checkpoint)
    alone = measure_quality(Trajectories(model, small), subject)
    made: list[int] = []
    plain = Trajectories.pair

    def stopping(self: Trajectories, subject: object, number: int) -> Pair:
        if number == 1 and not made.count(-1):
            made.append(-1)
            raise KeyboardInterrupt
        made.append(number)
        return plain(self, subject, number)  # type: ignore[arg-type]

    monkeypatch.setattr(Trajectories, "pair", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_quality(Trajectories(model, small), subject, key="it")
    assert measure_quality(Trajectories(model, small), subject, key="it") == alone
    assert made == [0, -1, 1]
    assert not any((tmp_path / "evaluations").iterdir())


def test_another_request_does_not_take_over_the_parts(
    way: Any, small: QualityPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path))
    model, subject = open_model(way.model), load_checkpoint(way.checkpoint)
    seen: list[str] = []
    monkeypatch.setattr(shared_work.shutil, "rmtree", lambda folder, **options: seen.append(folder.name))
    for plan, key in (
        (small, "a"),
        (small, "b"),
        (QualityPlan(replace(CHECKING, steps=3), samples=2, keep=2), "a"),
    ):
        list(Trajectories(model, plan).pairs(subject, key))
    assert len(set(seen)) == 3


ONE_IMAGE_AT_A_TIME = """
import sys
from qdeploy.cli import main
from qdeploy.evaluate.quality import QualityPlan

QualityPlan.batches = lambda self: [range(image, image + 1) for image in range(self.samples)]
main()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(way: Any, tmp_path: Path) -> None:
    """Real processes, joined as launchers join them; one of them prints."""
    script = tmp_path / "check.py"
    script.write_text(ONE_IMAGE_AT_A_TIME)
    sizes = {"samples": 5, "steps": 2, "inference-steps": 3, "min-parity": 0, "min-sqnr": 0}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    check = ["check", str(way.checkpoint.path), "--reference", str(way.model), *options, "--json", "-q"]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for number, launcher in enumerate(([], together)):
        cache = tmp_path / f"cache{number}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "QDEPLOY_CACHE": str(cache)}
        command = [sys.executable, *launcher, str(script), *check]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
        assert not any((cache / "evaluations").iterdir())
    assert found[0] == found[1]
    assert found[0]["quality"]["psnr"]["count"] == 5
