"""Mutated inputs: manifests, files, recipes, models' configurations and options of the command line.

A seed makes one input. `outcome` says what the program makes of it: ``accepted``, ``refused`` in one sentence, or
what may not be: an ``internal`` error or a ``hang``.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.cli import main
from qdeploy.export.run import export
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.manifest import MANIFEST
from qdeploy.system.errors import QDeployError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import reseal
from tests.models import ddpm_folder

LONGEST = 30  # seconds
_DEEP: Any = json.loads("[" * 100 + "]" * 100)
HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        10**20,
        -(10**20),
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        " ",
        "x",
        "../x",
        "/etc/passwd",
        "a\nb",
        "\x00",
        "x" * 5000,
        "\ud83d\ude00",
        "None",
        "int8",
        "unet",
    ),
    *([], {}, [[]], {"": {}}, [None], {"a": 1}, _DEEP),
)
WORDS = (
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1",
    "9" * 20,
    "",
    " ",
    "x",
    "../x",
    "/",
    "\u0663",
    "1,2",
    "a=b",
    "{",
    "*x",
)
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


class Subjects:
    """One artifact of each kind that is mutated, and the model that they were made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = ddpm_folder(folder / "model")
        self.set = collect(self.model, folder / "set", keep=2, samples=2, steps=3).path
        recipe = {"calibration": self.set, "weights": "int8", "activations": "int8", "effort": "fast"}
        self.checkpoint = calibrate(self.model, folder / "checkpoint", **recipe).path  # type: ignore[call-overload]
        self.bundle = export(self.checkpoint, folder / "bundle").path

    def artifacts(self) -> dict[str, Path]:
        return {"checkpoint": self.checkpoint, "set": self.set, "bundle": self.bundle}


def changed(value: Any, dice: random.Random) -> Any:
    """A JSON value with one place changed: replaced, removed, doubled or added to."""
    places: list[tuple[Any, Any]] = []

    def walk(item: Any) -> None:
        for key in item if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], dict | list):
                walk(item[key])

    walk(value)
    if not places:
        return dice.choice(HOSTILE)
    holder, key = dice.choice(places)
    how = dice.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[dice.choice(("extra", "", "../x", str(key) * 2))] = holder[key]
    else:
        holder[key] = dice.choice(HOSTILE)
    return value


def spoil(file: Path, dice: random.Random) -> None:
    """Change bytes of a file: flipped, cut, doubled, or emptied; of a JSON file mostly its structure."""
    content = bytearray(file.read_bytes())
    if file.suffix == ".json" and dice.random() < 0.7:
        file.write_text(json.dumps(changed(json.loads(content), dice)))
        return
    how = dice.randrange(4)
    # Heads hold what readers believe: lengths, types, offsets.
    end = min(len(content), 600) if dice.random() < 0.7 else len(content)
    if how == 0:
        del content[dice.randrange(max(1, len(content))) :]
    elif how == 1:
        content += content[: dice.randrange(1, 200)]
    else:
        for _ in range(dice.choice((1, 1, 3, 20))):
            if content:
                content[dice.randrange(max(1, end))] = dice.randrange(256)
    file.write_bytes(bytes(content))


def sealed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """As `reseal`, of what can have a hash; what cannot is written as it is."""
    try:
        reseal(folder, change)
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError, OSError):
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))


def command(*words: object) -> Callable[[], str]:
    """The outcome of a command line, run in this process."""

    def run() -> str:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exit_code == 1 or (result.exception and not isinstance(result.exception, SystemExit)):
            raise AssertionError(
                f"{[str(word)[:60] for word in words]}: {result.output[-300:]} {result.exception!r}"
            )
        return "accepted" if result.exit_code == 0 else "refused"

    return run


def called(function: Callable[[], object]) -> Callable[[], str]:
    """The outcome of a call."""

    def run() -> str:
        try:
            function()
        except QDeployError as error:
            if not str(error):
                raise AssertionError("a refusal without a word") from error
            return "refused"
        return "accepted"

    return run


def case(seed: int, subjects: Subjects, work: Path) -> tuple[str, Callable[[], str]]:
    """The kind of an input, and what runs it; files are below ``work``."""
    dice = random.Random(seed)
    kind = dice.choice(("manifest", "manifest", "file", "file", "recipe", "model", "options", "options"))
    if kind in ("manifest", "file"):
        name, source = dice.choice(sorted(subjects.artifacts().items()))
        place = work / "artifact"
        shutil.copytree(source, place)
        if kind == "manifest":
            part = dice.choice(("facts", "facts", "whole", "recipe"))

            def change(manifest: dict[str, Any]) -> None:
                changed(manifest if part == "whole" else manifest.get(part) or manifest, dice)

            sealed(place, change)
        else:
            files = [file for file in sorted(place.rglob("*")) if file.is_file() and file.name != MANIFEST]
            spoil(dice.choice(files), dice)
            sealed(place)
        readers: dict[str, Callable[[], str]] = {
            "checkpoint": called(lambda: load_checkpoint(place)),
            "set": called(lambda: CalibrationSet.open(place).inputs([0])),
            "bundle": command("lint", place),
        }
        return f"{kind} of a {name}", dice.choice((command("inspect", place, "--json"), readers[name]))
    if kind == "recipe":
        recipe = json.loads((subjects.checkpoint / MANIFEST).read_text())["recipe"]
        file = work / "recipe.yaml"
        text = yaml.safe_dump(changed(recipe, dice), allow_unicode=True)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        return kind, called(lambda: resolve_recipe(file))
    if kind == "model":
        place = work / "model"
        shutil.copytree(subjects.model, place)
        spoil(dice.choice([file for file in sorted(place.rglob("*")) if file.is_file()]), dice)
        how = dice.choice(("inspect", "preflight"))
        return kind, command(how, place, "--json")
    if dice.random() < 0.6:
        verb = dice.choice(sorted(DRY))
        given = [word for name in dice.sample(DRY[verb], 2) for word in (name, dice.choice(WORDS))]
        small = (
            ("--steps", 2, "--keep", 1, "--samples", 1)
            if verb == "collect"
            else ("--calibration", subjects.set)
        )
        words: list[object] = [verb, subjects.model, "-o", work / "out", "--dry-run", "-q", *small, *given]
        return f"options of {verb}", command(*words)
    known = {"bundle": subjects.bundle, "set": subjects.set}
    words = [word.format(**known) for word in dice.choice(OTHERS)]
    return f"options of {words[0]}", command(*words, dice.choice(WORDS))


def outcome(seed: int, subjects: Subjects, work: Path) -> tuple[str, str, str]:
    """The kind of an input, its outcome, and what is wrong with that, if anything is."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    kind, run = case(seed, subjects, work)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        return kind, run(), ""
    except TimeoutError:
        return kind, "hang", f"seed {seed}: more than {LONGEST} s"
    except (Exception, SystemExit) as error:
        return kind, "internal", f"seed {seed}: {type(error).__name__}: {str(error)[-400:]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
