"""What qdeploy runs sends nothing about its user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qdeploy.system.telemetry import SWITCHES


def run(code: str, folder: Path, **more: str) -> str:
    where = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    where |= {"TMPDIR": str(folder), **more}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, check=True)
    return done.stdout


def test_onnx_runtime_makes_no_identifier(tmp_path: Path) -> None:
    """Its telemetry writes one to the temporary folder as soon as it is imported."""
    run("import qdeploy, onnxruntime", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_openvino_makes_no_identifier(tmp_path: Path) -> None:
    """Its telemetry writes one to the home folder as soon as it is imported."""
    code = (
        "import os; from qdeploy.system.telemetry import import_silently; import_silently('openvino').Core(); "
        "print(os.environ.get('TF_BUILD'))"
    )
    assert run(code, tmp_path, HOME=str(tmp_path), CI="").strip() == "None"
    assert list(tmp_path.iterdir()) == []


def test_a_switch_that_is_set_stays(tmp_path: Path) -> None:
    printed = run(
        "import os, qdeploy; print(os.environ['RAY_USAGE_STATS_ENABLED'])",
        tmp_path,
        RAY_USAGE_STATS_ENABLED="1",
    )
    assert printed.strip() == "1"
