"""Python environments of the peers, which cannot be installed beside what qdeploy runs on."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def environment(name: str | None, folder: Path) -> Path:
    """The interpreter of an environment, made by pip from ``NAME.txt`` beside this file unless it is there.

    It sees this environment's packages, torch among them, under what is installed for it.

    Args:
        name: of the environment; None for this one.
        folder: where environments lie.

    Raises:
        subprocess.CalledProcessError: something cannot be installed.
    """
    if name is None:
        return Path(sys.executable)
    place = folder / name
    python, ready = place / "bin" / "python", place / "ready.txt"
    requirements = Path(__file__).with_name(f"{name}.txt")
    if not ready.is_file() or ready.read_text() != requirements.read_text():
        venv.create(place, with_pip=True, clear=True)
        site = next((place / "lib").glob("python*/site-packages"))
        (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
        subprocess.run(pip, check=True)
        ready.write_text(requirements.read_text())
    return python
