"""Benchmarks and tools are run by hand, some of them seldom: all of them begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a package that only this benchmark compares with
        assert error.name.split(".")[0] not in ("qdeploy", "benchmarks", "tools", "tests"), f"{name}: {error}"
"""


def test_every_benchmark_and_tool_is_imported() -> None:
    files = [path for folder in ("benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert "benchmarks.methods" in names
    ran = subprocess.run(
        [sys.executable, "-c", IMPORTS, *sorted(names)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
