"""Nothing outside of the outputs and the caches is written, and nothing of an input's folder is imported.

The verbs run in a child process under an audit hook, in a model's folder full of modules with tempting names.
Libraries in C++ open files without telling Python: so all folders are compared before and after, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import files_in
from tests.models import ddpm_folder

ROOT = Path(__file__).parent.parent.parent
BAIT = ("torch", "diffusers", "onnx", "sitecustomize", "modeling", "pipeline", "yaml")
VERBS: dict[str, list[str]] = {
    "collect": ["MODEL", "-o", "OUT/set", "--keep", "2", "--samples", "2", "--steps", "3"],
    "calibrate": ["MODEL", "-o", "OUT/checkpoint", "--calibration", "OUT/set", "--weights", "int7",
                  "--activations", "int8", "--effort", "fast"],
    "export": ["OUT/checkpoint", "-o", "OUT/bundle"],
    "build-engine": ["OUT/bundle", "-o", "OUT/engine", "--threads", "1", "--allow-inaccurate"],
    "sample": ["OUT/engine", "-o", "OUT/samples", "--samples", "1", "--steps", "2"],
    "check": ["OUT/engine", "--reference", "MODEL", "--samples", "2", "--steps", "2", "--keep", "2",
              "--min-parity", "0", "--min-sqnr", "0"],
}  # fmt: skip

CHILD = """
import json, os, sys
log = open(os.environ["AUDIT_LOG"], "a")
real = os.path.realpath
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
           "os.truncate": 1, "os.utime": 1, "shutil.copyfile": 2, "shutil.move": 2, "shutil.rmtree": 1}

def note(kind, path):
    if isinstance(path, (str, bytes, os.PathLike)):
        log.write(json.dumps([kind, real(os.fsdecode(path))]) + chr(10))
        log.flush()

def hook(event, given):
    if event == "open":
        path, mode, flags = given
        note("write" if isinstance(flags, int) and flags & WRITES else "read", path)
    elif event in CHANGES:
        inside = given[-1] if CHANGES[event] == 1 else -1  # the number of an open folder that the name is in
        for path in given[: CHANGES[event]]:
            if isinstance(inside, int) and inside > 2 and not os.path.isabs(path):
                path = os.path.join(real(f"/proc/self/fd/{inside}"), path)
            if not (event == "shutil.copyfile" and path is given[0]):
                note("write", path)
    elif event == "import" and given[1]:
        note("import", given[1])

sys.addaudithook(hook)
from qdeploy.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, (words[0], ended.code)
"""


def run(verbs: list[str], model: Path, folder: Path) -> list[tuple[str, Path]]:
    """Run the verbs one after the other in one child; what its Python code opened, changed and imported."""
    script, log = folder / "script" / "child.py", folder / "script" / "audit.jsonl"
    script.parent.mkdir()
    script.write_text(CHILD)
    for name in ("home", "temporary", "out"):
        (folder / name).mkdir()
    where = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "AUDIT_LOG": str(log),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "temporary"),
        "QDEPLOY_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        "OMP_NUM_THREADS": "1",
    }
    words = [
        [
            verb,
            *(word.replace("MODEL", str(model)).replace("OUT", str(folder / "out")) for word in VERBS[verb]),
        ]
        for verb in verbs
    ]
    child = subprocess.run(
        [sys.executable, str(script), json.dumps(words)], cwd=model, env=where, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found: list[Any] = [json.loads(line) for line in log.read_text().splitlines()]
    return [(kind, Path(path)) for kind, path in found]


def check_sandbox(verbs: list[str], tmp_path: Path) -> None:
    model, secret = ddpm_folder(tmp_path / "in" / "model"), tmp_path / "in" / "secret.txt"
    for name in BAIT:
        for place in (model, model / "unet"):
            (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    secret.write_text("private")
    before = files_in(tmp_path / "in")
    found = run(verbs, model, tmp_path)
    assert len(found) > 100  # the hook listens
    home = tmp_path / "home"
    mine = [tmp_path / "out", tmp_path / "cache", tmp_path / "temporary", home / ".cache", home / ".config"]
    allowed = [*mine, Path("/dev"), Path("/proc/self"), Path(f"/proc/{os.getpid()}")]
    written = {path for kind, path in found if kind == "write"}
    outside = {path for path in written if not any(path.is_relative_to(place) for place in allowed)}
    # Byte code of libraries that are imported for the first time is Python's own cache.
    assert {path for path in outside if "__pycache__" not in path.parts} == set()
    touched = {(kind, path) for kind, path in found if path.is_relative_to(tmp_path / "in")}
    assert {kind for kind, _ in touched} == {"read"}
    assert not [path for _, path in touched if path.suffix in (".py", ".pyc", ".so")]
    assert secret not in {path for _, path in touched}
    assert files_in(tmp_path / "in") == before
    expected = {"in", "script", "home", "temporary", "out", "cache"}
    assert {path.name for path in tmp_path.iterdir()} <= expected
    assert {path.name for path in home.iterdir()} <= {".cache", ".config"}
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_collecting_stays_in_its_place(tmp_path: Path) -> None:
    check_sandbox(["collect"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_verb_stays_in_its_place(tmp_path: Path) -> None:
    check_sandbox(list(VERBS), tmp_path)
