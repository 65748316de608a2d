"""From prompt to PNG: whole pipelines of qdeploy and of its peers, taking turns, with the same prompts and seeds.

    python -m benchmarks.pipeline --shape scenes --steps 4 20 50 --rounds 12
    python -m benchmarks.pipeline --shape sd217 --steps 4 20 --rounds 3 --one-at-a-time

Every contender is a process of its own; peers run in environments of their own, which are made on the first run
(``--environments``). The first picture of a process is a warm-up and counted apart. Full precision in torch gives
the pictures that the others are compared with. Writes ``pipeline-SHAPE.json``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.models import PROMPTS, model_folder
from benchmarks.pipeline_report import tables
from benchmarks.pipelines import PARTS, Case, Contender, contenders
from benchmarks.pipelines.environments import environment
from benchmarks.pipelines.stock_torch import FULL
from benchmarks.pipelines.worker import ContenderFailed, Process
from qdeploy.store.files import write_json
from qdeploy.system.machine import has_bf16, int8_sums_saturate, machine
from qdeploy.system.progress import say

SIZES = {"scenes": 64, "sd217": 256}
GUIDANCE = 4.0
FIRST_SEED = 2**20  # no calibration has seen these


@dataclass
class Race:
    """Contenders and what they did.

    Attributes:
        case: what all are given.
        environments: folder of the peers' environments.
        steps: numbers of sampling steps.
        rows: by contender, what was measured.
        skipped: by contender, why it is left out.
    """

    case: Case
    environments: Path
    steps: Sequence[int]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def process(self, contender: Contender) -> Process:
        """A process of the contender."""
        python = environment(contender.environment, self.environments)
        return Process(python, contender.name, self.case, self.case.place("log.txt"))

    def prepare(self, wanted: Sequence[Contender], done: bool) -> list[Contender]:
        """Let those that are wanted, and what they need, be prepared, unless it is done; those that can run."""
        known, ready = contenders(), []
        for contender in wanted:
            reason = contender.obstacle(self.case)
            needed = [contender] if contender.after is None else [known[contender.after], contender]
            for each in [] if reason or done else needed:
                try:
                    if each.prepare is not None:
                        say(f"preparing {each.name}")
                        process = self.process(each)
                        process.ask("prepare")
                        process.end()
                except (ContenderFailed, subprocess.CalledProcessError) as error:
                    reason = f"{each.name} cannot be prepared: {error}"
            if reason:
                self._leave_out(contender, reason)
            else:
                ready.append(contender)
        return ready

    def opened(self, contender: Contender) -> Process | None:
        """The contender's process after its first picture; None if it fails."""
        row = self.rows.setdefault(
            contender.name,
            {
                "quantized": contender.quantized,
                "folder_mb": _megabytes(self.case.place(contender.folder or self.case.model)),
                "load_s": [],
                "load_cpu_s": [],
                "first_s": [],
                "peak_mb": 0.0,
                "steps": {str(steps): {"cpu_s": [], "s": [], "parts_ms": []} for steps in self.steps},
            },
        )
        try:
            process = self.process(contender)
            loaded = process.ask("open")
            first = process.ask(
                "image", image=0, steps=min(self.steps), file=str(self.case.place("first.png"))
            )
        except ContenderFailed as error:
            del self.rows[contender.name]
            self._leave_out(contender, str(error))
            return None
        row["load_s"].append(loaded["s"])
        row["load_cpu_s"].append(loaded["cpu_s"])
        row["first_s"].append(first["s"])
        return process

    def turn(self, contender: Contender, process: Process, steps: int, number: int) -> None:
        """One picture."""
        file = self.picture(contender.name, steps, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        told = process.ask("image", image=FIRST_SEED + number, steps=steps, file=str(file))
        found = self.rows[contender.name]["steps"][str(steps)]
        for name in found:
            found[name].append(told[name])

    def leave(self, contender: Contender, process: Process) -> None:
        """Ask for the peak of memory, and let the process go."""
        row = self.rows[contender.name]
        row["peak_mb"] = max(row["peak_mb"], process.ask("memory")["peak_mb"])
        process.end()

    def picture(self, name: str, steps: int, number: int) -> Path:
        """Where a picture lies."""
        folder = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self.case.place("pictures") / folder / f"{steps}-{number}.png"

    def run(self, ready: Sequence[Contender], rounds: int, together: bool) -> None:
        """All turns: one round after the other, in an order that changes.

        Args:
            ready: who takes part.
            rounds: pictures of each, for each number of steps.
            together: keep all loaded; else each is loaded for its turn of one picture for each number of steps.
        """
        running: dict[str, Process] = {}
        order = list(ready)
        for number in range(rounds):
            for contender in list(order):
                process = running.pop(contender.name, None) or self.opened(contender)
                if process is None:
                    order.remove(contender)
                    continue
                say(f"round {number + 1} of {rounds}: {contender.name}")
                for steps in self.steps:
                    self.turn(contender, process, steps, number)
                if together and number < rounds - 1:
                    running[contender.name] = process
                else:
                    self.leave(contender, process)
            order.append(order.pop(0))

    def compare(self) -> None:
        """SQNR and PSNR of each contender's pictures to those of full precision in torch."""
        for name, row in self.rows.items():
            if name == FULL or FULL not in self.rows:
                continue
            for steps, found in row["steps"].items():
                pairs = [
                    [_pixels(self.picture(each, int(steps), number)) for each in (FULL, name)]
                    for number in range(len(found["s"]))
                ]
                error = np.mean([np.square(full - own).mean() for full, own in pairs])
                power = np.mean([full.var() for full, _ in pairs])
                found["psnr_db"] = float(10 * math.log10(255**2 / max(error, 1e-9)))
                found["sqnr_db"] = float(10 * math.log10(power / max(error, 1e-9)))

    def _leave_out(self, contender: Contender, reason: str) -> None:
        self.skipped[contender.name] = reason
        say(f"{contender.name} is left out: {reason}")


def _pixels(file: Path) -> Any:
    return np.asarray(Image.open(file).convert("RGB"), dtype=np.float64)


def _megabytes(folder: Path) -> float:
    """Megabytes of a folder; a file with several names counts once."""
    files = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return sum(files.values()) / 1e6


def _prompts(shape: str) -> Iterator[str]:
    if shape == "scenes":
        from tools.zoo.judge_scenes import held_out_prompts

        yield from held_out_prompts(8)
    else:
        yield from PROMPTS


def main() -> None:
    """Prepare, race, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SIZES, default="scenes")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--environments", type=Path, default=Path("runs/environments"))
    parser.add_argument("--one-at-a-time", action="store_true", help="load each for its turn alone")
    parser.add_argument("--only", nargs="*", help="parts of contenders' names; all by default")
    parser.add_argument("--without", nargs="*", default=[], help="parts of names of those to leave out")
    parser.add_argument("--prepared", action="store_true", help="all files are there: prepare nothing")
    parser.add_argument("--prepare", action="store_true", help="quantize and write files, and stop")
    parser.add_argument("--note", help="a sentence that goes into the results")
    given = parser.parse_args()
    folder = (given.output / given.shape).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    case = Case(
        given.shape,
        str(folder),
        str(model_folder(given.shape, given.output.resolve() / "models")),
        SIZES[given.shape],
        GUIDANCE,
        given.threads,
        tuple(_prompts(given.shape)),
        has_bf16(),
        "int7" if int8_sums_saturate() else "int8",
    )
    race = Race(case, given.environments.resolve(), given.steps)
    wanted = [
        each
        for each in contenders().values()
        if (not given.only or any(part in each.name for part in given.only))
        and not any(part in each.name for part in given.without)
    ]
    ready = race.prepare(wanted, given.prepared)
    if given.prepare:
        return
    race.run(ready, given.rounds, not given.one_at_a_time)
    race.compare()
    found = {
        "shape": given.shape,
        "size": case.size,
        "guidance": GUIDANCE,
        "threads": given.threads,
        "rounds": given.rounds,
        "weights": case.weights,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m benchmarks.pipeline {shlex.join(sys.argv[1:])}",
        "parts": list(PARTS),
        "rows": race.rows,
        "skipped": race.skipped,
        **({"note": given.note} if given.note else {}),
    }
    write_json(given.output / f"pipeline-{given.shape}.json", found)
    print(tables(found))


if __name__ == "__main__":
    main()
