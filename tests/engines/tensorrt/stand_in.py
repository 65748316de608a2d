"""The real bindings over libraries that are compiled here: a package path for a process that needs both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).parent / "fake" / "nvinfer.c"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
PRELOAD = """import ctypes, pathlib
for name in {names}:
    ctypes.CDLL(str(pathlib.Path(__file__).parents[1] / name), mode=ctypes.RTLD_GLOBAL)
"""
SHIM = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


@dataclass
class StandIn:
    """A folder with the libraries, ``tensorrt_libs`` that loads them, and ``tensorrt`` for the bindings."""

    folder: Path

    def run(self, *arguments: object, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run Python with the stand-in; ``package`` is where qdeploy lies."""
        path = os.pathsep.join(str(part) for part in (self.folder, package, ROOT))
        environment = os.environ | {"PYTHONPATH": path, "STAND_IN": str(self.folder / "libnvinfer.so.11")}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.folder,
            timeout=120,
            check=False,
        )

    def scenarios(self, package: Path = ROOT) -> dict[str, object]:
        """Play all scenarios; a crash is reported as the failure of the one that was running."""
        done = self.run("-m", "tests.engines.tensorrt.scenarios", package=package)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        running = [line for line in done.stderr.splitlines() if line.startswith("running")] or [
            "running nothing"
        ]
        return {
            "failed": {running[-1].removeprefix("running "): done.stderr[-2000:]},
            "scenes": [],
            "recorded": 0,
        }


def make_stand_in(folder: Path) -> StandIn:
    """Compile the libraries; skips where there are no bindings or no compiler."""
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("needs the package tensorrt-cu13-bindings, which the extra dev installs")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (folder / "empty.c").write_text("")
    for name in LIBRARIES:
        source = SOURCE if name == "nvinfer" else folder / "empty.c"
        soname = f"lib{name}.so.11"
        command = [compiler, "-shared", "-fPIC", "-w", "-std=gnu11", f"-Wl,-soname,{soname}", str(source)]
        subprocess.run([*command, "-o", str(folder / soname)], check=True, capture_output=True)
    for package, text in {
        "tensorrt_libs": PRELOAD.format(names=[f"lib{name}.so.11" for name in LIBRARIES]),
        "tensorrt": SHIM,
    }.items():
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(text)
    return StandIn(folder)


def conformance(stand_in: StandIn, package: Path = ROOT) -> dict[str, list[str]]:
    """Names of TensorRT that a package's sources use: all that were ``checked``, and those that are ``wrong``."""
    done = stand_in.run("-m", "tests.engines.tensorrt.conformance", package, package=package)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
