"""The checks are worth something: each of the classic mistakes, planted in a copy, makes one of them fail."""

from __future__ import annotations

import shutil
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
KEEP = "        _loggers[id(trt)] = _make(trt)\n    return _loggers[id(trt)]"

# what, file, what stands there, what the mistake makes of it, what must fail
MISTAKES = [
    ("removed flag", "builder.py", "trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "'FP16' does not exist"),
    ("pathlib path", "parser.py", "str(path.resolve())", "path.resolve()", "scene_a_build_calls"),
    ("wrong enum", "builder.py", "trt.MemoryPoolType.WORKSPACE", "trt.ProfilingVerbosity.DETAILED",
     "scene_every_wish_reaches"),
    ("unset profile", "profiles.py", "if not native or config.add_optimization_profile(native) == -1:",
     "if not native:", "scene_a_build_calls"),
    ("forgotten address", "execution.py", "{**inputs, **outputs}", "dict(inputs)", "scene_a_call_keeps_the_order"),
    ("shapes set too late", "execution.py", SET_SHAPES + INFER, LATE, "scene_a_call_keeps_the_order"),
    ("ignored None", "builder.py", "if plan is None:", "if plan is NotImplemented:", "scene_no_plan_is_an_error"),
    ("ignored False", "execution.py", "        if not done:", "        if done is None:", "scene_every_failure"),
    ("freed logger", "logger.py", KEEP, "        pass\n    return _make(trt)", "scene_the_logger_lives"),
    ("wrong dtype", "dtypes.py", '"FLOAT": "float32"', '"FLOAT": "float16"', "scene_a_build_calls"),
    ("ignored -1", "profiles.py", "config.add_optimization_profile(native) == -1",
     "config.add_optimization_profile(native) is None", "scene_a_refused_profile"),
]  # fmt: skip


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
    complaints = [*stand_in.scenarios(tmp_path)["failed"], *conformance(stand_in, tmp_path)["wrong"]]
    assert any(caught in complaint for complaint in complaints), complaints
