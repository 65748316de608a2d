"""Whole pipelines are timed beside torch's, part by part, and their images compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.evaluate.intervals import of_median
from qdeploy.evaluate.pipeline_speed import PARTS, benchmark_pipelines
from qdeploy.store.artifact import EngineFolder
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import has_bf16


def test_a_pipeline_beside_torch(
    qdeploy: Callable[..., Result], stable_diffusion_engine: EngineFolder, stable_diffusion: Path
) -> None:
    asked = ("--prompt", "a cat", "--steps", 2, "--rounds", 3, "--reference", stable_diffusion)
    done = qdeploy("benchmark", stable_diffusion_engine.path, "--pipeline", *asked, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    torches = ["torch f32", "torch bf16"] if has_bf16() else ["torch f32"]
    assert [each["name"] for each in told["results"]] == [*torches, "engine"]
    for each in told["results"]:
        assert each["parts_ms"].keys() == set(PARTS)
        assert all(part > 0 for part in each["parts_ms"].values())
        assert sum(each["parts_ms"].values()) < each["ms"]["p95"]
        assert each["images_per_cpu_second"] > 0
    assert told["results"][0]["psnr_db"] is None
    assert told["results"][-1]["psnr_db"] > 30
    assert told["ratios"].keys() == {f"engine vs {name}" for name in torches}
    assert (told["rounds"], told["threads"], told["steps"]) == (3, 1, 2)


def test_impossible_requests_are_refused(
    qdeploy: Callable[..., Result], stable_diffusion_engine: EngineFolder
) -> None:
    done = qdeploy("benchmark", stable_diffusion_engine.path, "--steps", 2)
    assert (done.exit_code, "--steps is about whole pipelines" in done.stderr) == (2, True)
    with pytest.raises(UsageError, match="at least one engine"):
        benchmark_pipelines([])
    with pytest.raises(UsageError, match="at least 1"):
        benchmark_pipelines([stable_diffusion_engine], rounds=0)


def test_the_interval_of_a_median_is_of_the_sign_test() -> None:
    # Conover, Practical Nonparametric Statistics: of 16 values the 4th and the 13th at 95 %.
    values = [float(value) for value in range(1, 17)]
    assert of_median(values[::-1]) == [4, 13]
    assert of_median(values[:6]) == [1, 6]
    assert of_median(values[:5]) is None
