"""The checks are worth something: each of the classic mistakes, planted in a copy, makes one of them fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.tensorrt.stand_in import ROOT, StandIn, conformance

SET_SHAPES = """        for name, shape in shapes.items():
            self._require(self.context.set_input_shape(name, shape), f"the shape of {name!r}")
"""
INFER = "        if missing := self.context.infer_shapes():\n"
LATE = (
    "        self.context.infer_shapes()\n        self.context.get_tensor_shape('out_sample')\n"
    + SET_SHAPES
    + INFER
)
ADD = "if config.add_optimization_profile(native) == -1:"
KEEP = "        _loggers[id(trt)] = _make(trt)\n    return _loggers[id(trt)]"

# what, file, what stands there, what the mistake makes of it, what must fail: the conformance check, a scene over the
# stand-in, or a test of `test_builder.py` over the real library
MISTAKES = [
    ("removed flag", "builder.py", "trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "'FP16' does not exist"),
    ("pathlib path", "parser.py", "str(path.resolve())", "path.resolve()", "test_a_plan_is_built"),
    ("wrong enum", "builder.py", "trt.MemoryPoolType.WORKSPACE", "trt.ProfilingVerbosity.DETAILED",
     "test_every_wish_reaches_the_configuration"),
    ("unset profile", "profiles.py", ADD, "if native is None:", "test_a_plan_is_built"),
    ("forgotten address", "execution.py", "{**inputs, **outputs}", "dict(inputs)", "scene_a_call_keeps_the_order"),
    ("shapes set too late", "execution.py", SET_SHAPES + INFER, LATE, "scene_a_call_keeps_the_order"),
    ("ignored None", "builder.py", "if plan is None:", "if plan is NotImplemented:", "test_no_plan_is_an_error"),
    ("ignored False", "execution.py", "        if not done:", "        if done is None:", "scene_every_failure"),
    ("freed logger", "logger.py", KEEP, "        pass\n    return _make(trt)", "test_the_logger_lives"),
    ("wrong dtype", "dtypes.py", '"FLOAT": "float32"', '"FLOAT": "float16"', "test_a_plan_is_built"),
    ("ignored -1", "profiles.py", ADD, f"{ADD[:-6]} is None:", "test_a_refused_profile_is_an_error"),
]  # fmt: skip


def complaints(stand_in: StandIn, package: Path, caught: str) -> list[str]:
    """What the checks say of a package with a mistake in it."""
    if not caught.startswith("test_"):
        return [*stand_in.scenarios(package)["failed"], *conformance(stand_in, package)["wrong"]]
    tests = [str(Path(__file__).with_name("test_builder.py")), "-k", caught]
    options = ["-c", os.devnull, "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
    path = os.pathsep.join(map(str, (package, ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=package,
        timeout=120,
        check=False,
    )
    return [line for line in done.stdout.splitlines() if line.startswith("FAILED")]


@pytest.mark.parametrize(
    ("file", "right", "wrong", "caught"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_planted_mistake_is_caught(
    stand_in: StandIn, tmp_path: Path, file: str, right: str, wrong: str, caught: str
) -> None:
    shutil.copytree(ROOT / "qdeploy", tmp_path / "qdeploy", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "qdeploy" / "engines" / "tensorrt" / file
    source = path.read_text()
    assert source.count(right) == 1, "the source has changed: plant the mistake anew"
    path.write_text(source.replace(right, wrong))
    said = complaints(stand_in, tmp_path, caught)
    assert any(caught in complaint for complaint in said), said
