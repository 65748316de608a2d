"""Are artifacts byte-identical in two revisions of the code? The net under every refactoring.

    python tools/golden.py --base v0.2.0              # every preset on `digits`, calibrated and exported by both
    python tools/golden.py --base HEAD~3 w8a8-minmax  # one preset

Both revisions run on this machine with this interpreter, since the last bits of floats differ between
processors: a table of hashes in the repository would hold on one machine only. An identity covers the files,
the recipe, the seed and the facts of an artifact; of two that differ, the parts that do are named. Exit code 1
if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPARED = ("files", "recipe", "seed", "facts", "made_from", "kind", "schema")
# Enough work for every stage to change something; rows are few, so that all presets take a few minutes.
SMALL = {"rows": 12, "batch": 6, "rounding": 6, "scales": 4, "tuning": 4}


def record(presets: list[str]) -> dict[str, Any]:
    """Manifests of a calibration set, and of checkpoint and bundle of each preset, by the code in sys.path."""
    import torch

    import qdeploy

    torch.set_num_threads(1)
    _shrink_effort()
    manifests: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        kept = signature(qdeploy.collect).parameters
        lengths = {"keep": 4, "steps": 8} if "keep" in kept else {"steps": 4, "inference_steps": 8}
        calibration = qdeploy.collect("digits", place / "set", samples=4, **lengths)
        manifests["calibration set"] = _manifest(calibration.path)
        for preset in presets:
            try:
                checkpoint = qdeploy.calibrate(
                    "digits", place / preset, recipe=preset, effort="fast", calibration=calibration
                )
            except Exception as refusal:  # as of more groups of timesteps than there are timesteps
                if all(kind.__name__ != "QDeployError" for kind in type(refusal).__mro__):
                    raise
                manifests[f"{preset}: refused"] = {"sha256": type(refusal).__name__}
                continue
            made = manifests[f"{preset}: checkpoint"] = _manifest(checkpoint.path)
            if made["facts"].get("simulated"):  # no engine can run it, so it has no graph
                continue
            bundle = qdeploy.export(checkpoint, place / f"{preset}-onnx")
            manifests[f"{preset}: bundle"] = _manifest(bundle.path)
    return manifests


def _shrink_effort() -> None:
    for home in ("qdeploy.recipe.effort", "qdeploy.calibrate.effort"):
        try:
            efforts = import_module(home).EFFORTS
        except ImportError:
            continue
        efforts["fast"] = replace(efforts["fast"], **SMALL)
        return
    raise SystemExit("the table of efforts is in neither of its known places")


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "qdeploy.json").read_text())
    return {key: manifest[key] for key in (*COMPARED, "sha256")}


def known_presets() -> list[str]:
    """Names of all presets of this revision."""
    return sorted(file.stem for file in ROOT.glob("qdeploy/recipe/presets/*.yaml"))


def run_in(tree: Path, presets: list[str]) -> dict[str, Any]:
    """What the code of another tree makes."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--record", *presets]
    with tempfile.TemporaryFile("w+") as output:
        subprocess.run(command, cwd=tree, env=environment, stdout=output, check=True)
        output.seek(0)
        found: dict[str, Any] = json.loads(output.read().splitlines()[-1])
    return found


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A revision in a temporary working tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        git(["git", "worktree", "add", "--detach", "--quiet", str(tree), revision])
        try:
            yield tree
        finally:
            git(["git", "worktree", "remove", "--force", str(tree)])


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A line for each artifact that is not the same."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name}: made by {'this tree' if name in after else 'the base'} only"
        elif before[name]["sha256"] != after[name]["sha256"]:
            yield f"{name}: {', '.join(_parts(before[name], after[name]))}"


def _parts(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for part in COMPARED:
        old, new = before.get(part), after.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (
                f"{part}.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
            )
        else:
            yield part


def main() -> None:
    """Compare two revisions, or record one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", help="presets to compare; all by default")
    parser.add_argument("--base", help="the revision to compare with")
    parser.add_argument("--record", action="store_true", help="print this tree's manifests as JSON")
    given = parser.parse_args()
    presets = given.presets or known_presets()
    if given.record:
        print(json.dumps(record(presets)))
        return
    if not given.base:
        parser.error("name the revision to compare with: --base REVISION")
    with checked_out(given.base) as tree, ThreadPoolExecutor(2) as both:
        before, after = both.map(partial(run_in, presets=presets), (tree, ROOT))
    found = list(differences(before, after))
    print("\n".join(found) or f"{len(after)} artifacts are byte-identical in {given.base} and here")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
