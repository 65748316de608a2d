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

from qdeploy.evaluate import quality_parts as parts_module
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric, metrics
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.evaluate.quality import QualityPlan, Trajectories, measure_quality
from qdeploy.evaluate.quality_parts import quality_parts
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


def test_requests_have_parts_of_their_own(way: Any, small: QualityPlan) -> None:
    model, subject = open_model(way.model), load_checkpoint(way.checkpoint)
    context = MetricContext(model)
    other = QualityPlan(replace(CHECKING, steps=3), samples=2, keep=2)
    places = {
        quality_parts(Trajectories(model, plan), subject, context, key).job.folder
        for plan, key in ((small, "a"), (small, "b"), (other, "a"), (small, "a"))
    }
    assert len(places) == 3


class OldMeter:
    """A meter of before parts: it takes whole pairs."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def add(self, pair: Pair) -> None:
        self.sums += [
            float(pair.images.double().sum()),
            *(float(call.predicted.sum()) for call in pair.calls),
        ]

    def result(self) -> list[float]:
        return self.sums


def test_meters_without_halves_get_whole_pairs(
    way: Any, small: QualityPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {**metrics(), "old": Metric("old", "takes whole pairs", lambda model: OldMeter())}
    monkeypatch.setattr(parts_module, "metrics", lambda: named)
    model, subject = open_model(way.model), load_checkpoint(way.checkpoint)
    alone = measure_quality(Trajectories(model, small), subject)
    assert measure_quality(Trajectories(model, small), subject, key="old") == alone
    assert len(alone["old"]) > 2


@pytest.mark.slow
def test_processes_find_what_one_finds_joined_by_a_launcher_or_by_chance(way: Any, tmp_path: Path) -> None:
    """Real processes. Of those that a launcher starts, one prints; two plain runs of one check both end right."""
    sizes = {"samples": 5, "steps": 3, "keep": 2, "batch": 1, "min-parity": 0, "min-sqnr": 0}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    check = ["check", str(way.checkpoint.path), "--reference", str(way.model), *options, "--json", "-q"]
    together = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "qdeploy.cli"]

    def start(launcher: list[str], cache: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "QDEPLOY_CACHE": str(cache)}
        command = [sys.executable, "-m", *launcher, *check]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    found = []
    for number, launchers in enumerate(([["qdeploy.cli"]], [together], [["qdeploy.cli"]] * 2)):
        cache = tmp_path / f"cache{number}"
        for process in [start(launcher, cache) for launcher in launchers]:
            printed, errors = process.communicate()
            assert process.returncode == 0, errors
            found.append(json.loads(printed))
        assert not any((cache / "evaluations").iterdir())
    assert all(each == found[0] for each in found)
    assert found[0]["quality"]["psnr"]["count"] == 5
