"""Python environments for programs that cannot be installed beside what the suite runs on.

They share this environment's packages, torch among them, under what is installed for them, and are kept in the folder
that QDEPLOY_TEST_ENVIRONMENTS names, so that a second run finds them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def environment(name: str, packages: tuple[str, ...], elsewhere: Path) -> Path:
    """The interpreter of an environment with these packages; the test is skipped where they cannot be had.

    Args:
        name: of its folder.
        packages: as pip takes them.
        elsewhere: where it lies if QDEPLOY_TEST_ENVIRONMENTS is not set.
    """
    folder = Path(os.environ.get("QDEPLOY_TEST_ENVIRONMENTS", elsewhere)) / name
    python, ready = folder / "bin" / "python", folder / "ready.json"
    if ready.is_file() and json.loads(ready.read_text()) == list(packages):
        return python
    venv.create(folder, with_pip=True, clear=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        pytest.skip(f"{', '.join(packages)}: {errors[-1]}")
    ready.write_text(json.dumps(list(packages)))
    return python


def run(python: Path, script: str, *arguments: object) -> dict[str, Any]:
    """What a script prints as JSON in its last line, run by the interpreter of an environment."""
    known = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, **known}, cwd=sys.prefix
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
