"""The templates for schedulers of jobs, carried out with a stand-in for the command that says how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from qdeploy.cli import main

TEMPLATES = Path(__file__).parents[2] / "examples" / "cluster"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    command = tmp_path / "bin" / "qdeploy"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def called(command: list[str], environment: dict[str, str]) -> list[str]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def understood(words: list[str]) -> None:
    """The command line knows all these words: what it refuses is the plan alone."""
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 5
    assert "is no plan" in result.output


@pytest.mark.parametrize(
    ("arguments", "wanted"), [(["8"], ["--part", "3/8"]), (["finish"], ["--finish"])], ids=["part", "finish"]
)
def test_slurm(tmp_path: Path, environment: dict[str, str], arguments: list[str], wanted: list[str]) -> None:
    plan = str(tmp_path / "a plan".replace(" ", "-"))
    environment["SLURM_ARRAY_TASK_ID"] = "3"
    words = called(["bash", str(TEMPLATES / "slurm.sh"), plan, *arguments], environment)
    assert words == ["work", plan, *wanted, "--json"]
    understood(words)


def test_kubernetes(environment: dict[str, str]) -> None:
    job: Any = yaml.safe_load((TEMPLATES / "kubernetes.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    own = {each["name"]: each["value"] for each in container["env"]}
    assert int(own["SHARES"]) == spec["completions"] == spec["parallelism"]
    shares = []
    for index in (0, spec["completions"] - 1):
        words = called(
            [*container["command"], *container["args"]],
            {**environment, **own, "JOB_COMPLETION_INDEX": str(index)},
        )
        assert words[:3] == ["work", own["PLAN"], "--part"]
        shares.append(words[3])
        understood(words)
    assert shares == ["1/64", "64/64"]
