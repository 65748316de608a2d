"""One calibration by two processes: the gradients of a step are those of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qdeploy.calibration_set.collect import collect
from qdeploy.store.artifact import Artifact, Checkpoint, open_artifact
from qdeploy.system.errors import UsageError
from qdeploy.workflows.calibrate import calibrate

ROOT = Path(__file__).parents[2]
RECIPE = """
method: qdiffusion
weights: int4
activations: int8
effort: fast
stages: [weight-ranges: {}, round-weights: {steps: 12}, activation-ranges: {}, learn-scales: {steps: 6}]
"""


@pytest.fixture(scope="module")
def data(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = collect(ddpm, tmp_path_factory.mktemp("together") / "set", samples=8, keep=3, steps=3)
    assert isinstance(made, Artifact)
    (made.path.parent / "recipe.yaml").write_text(RECIPE)
    return made


def together(model: Path, data: Artifact, output: Path) -> subprocess.Popen[str]:
    """`calibrate --data-parallel` by two processes, in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words = ["-m", "qdeploy.cli", "calibrate", str(model), "-o", str(output), "--calibration", str(data.path)]
    words += ["-r", str(data.path.parent / "recipe.yaml"), "--data-parallel"]
    return subprocess.Popen(
        [*command, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What it said, if it ended well."""
    said, _ = process.communicate(timeout=800)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_learn_what_one_does_but_for_rounding(
    ddpm: Path, data: Artifact, tmp_path: Path
) -> None:
    alone = calibrate(ddpm, tmp_path / "alone", recipe=data.path.parent / "recipe.yaml", calibration=data)
    said = finished(together(ddpm, data, tmp_path / "both"))
    assert said.count("\ncheckpoint ") == 1  # one process speaks of it
    both = open_artifact(tmp_path / "both", Checkpoint)
    assert not list(tmp_path.glob(".*"))
    assert both.sha256 != alone.sha256
    full, *simulated = [alone.probe()[1], *(each.probe()[2] for each in (alone, both))]
    errors = [float((full - each).square().mean() / full.square().mean()) for each in simulated]
    # Roundings that are kept or not are decisions, which rounding errors may turn: the quality is what has to agree.
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


STEPS = """
import sys, torch
from pathlib import Path
from qdeploy.calibrate.reconstruct import UnitProblem, optimize, output_error
from qdeploy.system.processes import are_together, is_main_process, working_together

class Rows:
    learn = torch.arange(40)
    x, y = (torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    def __init__(self, unit): self.unit = unit
    def error(self, rows, p): return output_error(self.unit(self.x[rows]), self.y[rows], p)

def learned():
    torch.manual_seed(0)
    unit = torch.nn.Linear(6, 6)
    loose = torch.nn.Parameter(torch.ones(3))  # the penalty alone depends on it
    parameters = [*unit.parameters(), loose]
    optimize(Rows(unit), parameters, 50, 7, 0.02, torch.Generator().manual_seed(3), 2.0,
             penalty=lambda step: loose.square().sum() + 0.1 * unit.weight.abs().sum(), cosine=True)
    return torch.cat([each.detach().flatten() for each in parameters])

if sys.argv[1] == "alone":
    torch.save(learned(), sys.argv[2])
else:
    import os
    threads = lambda: [Path(f"/proc/self/task/{each}/comm").read_text() for each in os.listdir("/proc/self/task")]
    with working_together("cpu"):
        found = learned()
        assert any("gloo" in name for name in threads())
    assert not any("gloo" in name for name in threads())  # they may abort a process that ends while they live
    torch.save(found, sys.argv[2] + os.environ["RANK"])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for words in (["steps.py", "alone", "alone"], [*torchrun, "steps.py", "both", "both"]):
        subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, check=True)
    alone, first, second = (torch.load(tmp_path / name) for name in ("alone", "both0", "both1"))
    assert torch.equal(first, second)
    assert torch.allclose(alone, first, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_go_on_where_they_were_killed(ddpm: Path, data: Artifact, tmp_path: Path) -> None:
    finished(together(ddpm, data, tmp_path / "whole"))
    process = together(ddpm, data, tmp_path / "killed")
    steps = tmp_path / ".killed.work" / "steps"
    while len(list(steps.glob("[!.]*.safetensors"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    finished(together(ddpm, data, tmp_path / "killed"))
    whole, killed = (open_artifact(tmp_path / name) for name in ("whole", "killed"))
    assert killed.sha256 == whole.sha256
    assert not list(tmp_path.glob(".*"))
    finished(together(ddpm, data, tmp_path / "killed"))  # found, not made again


@pytest.mark.parametrize(
    ("count", "recipe", "sentence"),
    [("1", "w8a8-minmax", "torchrun --nproc_per_node 2"), ("2", "w8a8-minmax", "learns by gradients"),
     ("4096", None, "too few for 4096 processes")],
    ids=["alone", "nothing learned", "too many"],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(
    ddpm: Path,
    data: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: str,
    recipe: str | None,
    sentence: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UsageError, match=sentence):
        calibrate(
            ddpm,
            tmp_path / "out",
            recipe=recipe or data.path.parent / "recipe.yaml",
            calibration=data,
            data_parallel=True,
        )
    assert not list(tmp_path.iterdir())
