"""Mutated inputs: manifests, files, recipes, models' configurations and options of the command line.

A seed makes one input. `outcome` says what the program makes of it: ``accepted``, ``refused`` in one sentence, or
what may not be: an ``internal`` error, a ``hang``, too much ``memory``, or ``unnoticed``, changed content that
was accepted under the hashes of the old one.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.cli import main
from qdeploy.engines.build import load_engine
from qdeploy.evaluate.report_page.images import images_of
from qdeploy.evaluate.report_page.sensitivity import read_sensitivity
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.artifact import Samples, open_artifact
from qdeploy.store.manifest import MANIFEST, RANGES_PICTURE
from qdeploy.system.errors import QDeployError
from qdeploy.system.memory import peak_memory
from qdeploy.workflows.calibrate import calibrate
from tests.engines.bundles import write_bundle
from tests.helpers import files_in
from tests.models import ddpm_folder
from tests.mutations import WORDS, change_manifest, changed, sealed, spoil

LONGEST = 30  # seconds of the processor
MOST_MEMORY = 2 * 2**30  # bytes
DRY = {
    "collect": ("--steps", "--keep", "--samples", "--guidance", "--eta", "--seed", "--batch", "--scheduler",
                "--height", "--prompt", "--prompts", "--pipeline-arg", "--timesteps", "--device", "-o"),
    "calibrate": ("--weights", "--activations", "--method", "--coverage", "--target", "--effort", "--seed", "--set",
                  "--exclude", "--timestep-groups", "--budget", "--recipe", "--calibration", "--max-memory"),
}  # fmt: skip
OTHERS = (
    *(
        ("lint", "{bundle}", name)
        for name in ("--target", "--engine", "--tensorrt", "--compute-capability", "--shapes")
    ),
    *(("build-engine", "{set}", name) for name in ("--backend", "--batch", "--threads", "--components")),
    *(("export", "{set}", name) for name in ("--target", "--time-table", "--table-rows", "--sizes")),
    *(("inspect", name) for name in ("--json", "--debug=")),
    *(("doctor", name) for name in ("--require",)),
)
KINDS = ("manifest", "manifest", "file", "file", "damage", "recipe", "model", "options", "options")


class UnnoticedError(Exception):
    """Changed content was accepted under the hashes of the old one."""


class Subjects:
    """One artifact of each kind that is mutated, and the models that they were made from.

    Args:
        folder: where they are made.
        whole: all kinds, as the verbs make them, and a pipeline with prompts: a minute. Otherwise those that cost
            no tracing.
    """

    def __init__(self, folder: Path, whole: bool = False) -> None:
        model = ddpm_folder(folder / "model")
        self.models = [model]
        data = collect(model, folder / "set", keep=2, samples=2, steps=3).path
        recipe = {"calibration": data, "weights": "int8", "activations": "int8", "effort": "fast"}
        checkpoint = calibrate(model, folder / "checkpoint", **recipe)  # type: ignore[call-overload]
        self.artifacts = {"checkpoint": checkpoint.path, "set": data}
        if whole:
            self._make_the_rest(folder, checkpoint.path)
        else:
            self.artifacts["bundle"] = write_bundle(folder / "bundle").path

    def _make_the_rest(self, folder: Path, checkpoint: Path) -> None:
        from qdeploy.engines.build import build_engine
        from qdeploy.export.run import export
        from qdeploy.mixed.sensitivity import sensitivity
        from qdeploy.sampling.sample import sample
        from tests.models import stable_diffusion_folder

        model, data = self.models[0], self.artifacts["set"]
        self.models.append(stable_diffusion_folder(folder / "prompted"))
        bundle = export(checkpoint, folder / "bundle")
        self.artifacts["bundle"] = bundle.path
        self.artifacts["engine"] = build_engine(
            bundle, folder / "engine", threads=1, allow_inaccurate=True
        ).path
        self.artifacts["samples"] = sample(model, folder / "samples", samples=1, steps=2).path
        measured = sensitivity(model, folder / "sensitivity", calibration=data, formats=["int8", "int4"])
        self.artifacts["sensitivity"] = measured.path


def command(*words: object) -> str:
    """The outcome of a command line, run in this process."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exit_code == 1 or (result.exception and not isinstance(result.exception, SystemExit)):
        raise AssertionError(
            f"{[str(word)[:60] for word in words]}: {result.output[-300:]} {result.exception!r}"
        )
    return "accepted" if result.exit_code == 0 else "refused"


def called(function: Callable[[], object]) -> str:
    """The outcome of a call."""
    try:
        function()
    except QDeployError as error:
        if not str(error):
            raise AssertionError("a refusal without a word") from error
        return "refused"
    return "accepted"


def _artifact(
    kind: str, subjects: Subjects, work: Path, dice: random.Random
) -> tuple[str, Callable[[], str]]:
    """An artifact with a changed manifest or a changed file; sealed again unless it is mere ``damage``."""
    name, source = dice.choice(sorted(subjects.artifacts.items()))
    place = work / "artifact"
    shutil.copytree(source, place)
    seal = kind != "damage"
    if kind == "manifest" or (not seal and dice.random() < 0.4):
        part = dice.choice(("facts", "facts", "whole", "recipe"))
        state = dice.getrandbits(64)  # a change may be tried twice

        def change(manifest: dict[str, Any]) -> None:
            changed(manifest if part == "whole" else manifest.get(part) or manifest, random.Random(state))

        (sealed if seal else change_manifest)(place, change)
    else:
        spoil(
            dice.choice(
                [file for file in sorted(place.rglob("*")) if file.is_file() and file.name != MANIFEST]
            ),
            dice,
        )
        if seal:
            sealed(place)
    readers: dict[str, Callable[[], str]] = {
        "checkpoint": partial(called, lambda: load_checkpoint(place)),
        "set": partial(called, lambda: CalibrationSet.open(place).inputs([0])),
        "bundle": partial(command, "lint", place),
        "engine": partial(called, lambda: load_engine(place, threads=1)),
        "samples": partial(called, lambda: images_of(open_artifact(place, Samples))),
        "sensitivity": partial(called, lambda: read_sensitivity(place)),
    }
    if not seal:
        return f"damage of a {name}", partial(_unsealed, source, place)
    read = dice.choice((partial(command, "inspect", place, "--json"), readers[name]))
    return f"{kind} of a {name}", partial(_sealed, read, source, place)


def _unsealed(source: Path, place: Path) -> str:
    found = called(lambda: open_artifact(place))
    same = _content(source) == _content(place)
    if found == "accepted" and not same:
        raise UnnoticedError("damage was not noticed")
    return found


def _sealed(read: Callable[[], str], source: Path, place: Path) -> str:
    """Whoever seals it again may change content; but then it is another artifact."""
    found = read()
    with suppress(QDeployError):
        old, new = open_artifact(source), open_artifact(place)
        if old.sha256 == new.sha256 and (dict(old.files), old.facts) != (dict(new.files), new.facts):
            raise UnnoticedError("other content under the same identity")
    return found


def _content(folder: Path) -> object:
    """What a folder says, without regard to how its manifest is laid out."""
    files = files_in(folder)
    files.pop(RANGES_PICTURE, None)  # no part of it
    manifest = files.pop(MANIFEST)
    try:
        return files, json.dumps(json.loads(manifest), sort_keys=True)
    except ValueError:
        return files, manifest


def case(seed: int, subjects: Subjects, work: Path) -> tuple[str, Callable[[], str]]:
    """The kind of an input, and what runs it; files are below ``work``."""
    dice = random.Random(seed)
    kind = dice.choice(KINDS)
    if kind in ("manifest", "file", "damage"):
        return _artifact(kind, subjects, work, dice)
    if kind == "recipe":
        recipe = json.loads((subjects.artifacts["checkpoint"] / MANIFEST).read_text())["recipe"]
        file = work / "recipe.yaml"
        text = yaml.safe_dump(changed(recipe, dice), allow_unicode=True)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        return kind, partial(called, lambda: resolve_recipe(file))
    if kind == "model":
        place = work / "model"
        shutil.copytree(dice.choice(subjects.models), place)
        spoil(dice.choice([file for file in sorted(place.rglob("*")) if file.is_file()]), dice)
        how = dice.choice(("inspect", "preflight"))
        return kind, partial(command, how, place, "--json")
    if dice.random() < 0.6:
        verb = dice.choice(sorted(DRY))
        given = [word for name in dice.sample(DRY[verb], 2) for word in (name, dice.choice(WORDS))]
        small = (
            ("--steps", 2, "--keep", 1, "--samples", 1)
            if verb == "collect"
            else ("--calibration", subjects.artifacts["set"])
        )
        words: list[object] = [
            verb,
            subjects.models[0],
            "-o",
            work / "out",
            "--dry-run",
            "-q",
            *small,
            *given,
        ]
        return f"options of {verb}", partial(command, *words)
    words = [word.format(**subjects.artifacts) for word in dice.choice(OTHERS)]
    return f"options of {words[0]}", partial(command, *words, dice.choice(WORDS))


def outcome(seed: int, subjects: Subjects, work: Path) -> tuple[str, str, str]:
    """The kind of an input, its outcome, and what is wrong with that, if anything is."""

    stopped = []

    def late(number: int, frame: object) -> None:
        stopped.append(seed)
        raise TimeoutError

    kind, run = case(seed, subjects, work)
    with suppress(OSError):  # Linux: count the peak of memory anew
        Path("/proc/self/clear_refs").write_text("5")
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        found, why = run(), ""
    except UnnoticedError as error:
        found, why = "unnoticed", str(error)
    except (Exception, SystemExit) as error:
        found, why = "internal", f"{type(error).__name__}: {str(error)[-400:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if stopped:  # whoever caught it
        found, why = "hang", f"more than {LONGEST} s"
    if why:
        return kind, found, f"seed {seed}: {why}"
    if (peak := peak_memory() or 0) > MOST_MEMORY:
        return kind, "memory", f"seed {seed}: {peak / 2**30:.1f} GiB"
    return kind, found, ""
