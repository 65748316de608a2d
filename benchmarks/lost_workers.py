"""Workers that are killed, frozen or cut off from their storage: is the result that of one process?

    python -m benchmarks.lost_workers -o benchmarks/results/lost-workers.json --times 10

For `sample`, `collect`, `sensitivity` and `check` on ``digits``: one process gives the expected identity (sha256).
Then the same work in parts, each form ``--times`` times, at random moments:

    ray         two workers of Ray, undisturbed (once)
    shuffled    ``work --part K/N``, the shares in random order, one of them twice
    killed      two workers, one of which gets SIGKILL and is replaced
    frozen      two workers, one of which stands still (SIGSTOP) until others take it for dead, and then goes on
    cut off     two workers, one of which sees an empty disk for a while in place of the storage (a mount of its own
                namespace; needs root on Linux)
    ray killed  two workers of Ray that get SIGKILL, several times in one run

Workers are processes of their own, forked after torch is imported, which is most of what a start takes. Leases go
stale thirty times as fast as usual, so that frozen workers are taken for dead within seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qdeploy.calibration_set.collect import collect
from qdeploy.evaluate.check import check
from qdeploy.mixed.sensitivity import sensitivity
from qdeploy.parts import folder as part_folder
from qdeploy.parts import leases
from qdeploy.sampling.sample import sample
from qdeploy.store.files import write_json
from qdeploy.system.errors import Planned
from qdeploy.system.hashing import sha256_of
from qdeploy.system.machine import machine
from qdeploy.workflows.calibrate import calibrate
from qdeploy.workflows.work import work

FAST = {"BEAT": leases.BEAT / 30, "STALE": leases.STALE / 30}  # seconds
FEW = {"steps": 2, "batch": 2, "samples": 16, "seed": 5}
FORMS = ("shuffled", "killed", "frozen", "cut off", "ray", "ray killed")
KILLS_OF_A_RUN = 5  # of Ray's workers
_NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS


def calls(inputs: Path, output: Path) -> dict[str, Callable[..., Any]]:
    """The verbs that work in parts, each as a call that takes a place."""
    measured = {"calibration": inputs / "set", "formats": ["int4"], "rows": 4, "probes": 1}
    return {
        "sample": lambda **place: sample("digits", output, npz=True, shards=6, **FEW, **place),
        "collect": lambda **place: collect("digits", output, keep=2, **FEW, **place),
        "sensitivity": lambda **place: sensitivity("digits", output, **measured, **place),
        "check": lambda **place: check(
            inputs / "checkpoint", reference="digits", keep=2, min_sqnr=0, **{**FEW, "seed": 1}, **place
        ),
    }


def told(result: Any) -> str:
    """What has to be equal: an artifact's identity, or the hash of all that a check found."""
    return str(result.sha256) if hasattr(result, "sha256") else sha256_of(result.to_json())


def forked(run: Callable[[], object], log: Path) -> int:
    """A process that runs a function and ends; its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        torch.set_num_threads(1)
        leases.BEAT, leases.STALE = FAST["BEAT"], FAST["STALE"]
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        run()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Bench:
    """One verb, its inputs, and the folder in which everything happens.

    Args:
        verb: its name.
        inputs: folder with a calibration set and a checkpoint.
        folder: for this verb.
        seed: of random moments and orders.
    """

    def __init__(self, verb: str, inputs: Path, folder: Path, seed: int = 0) -> None:
        self.verb, self.inputs, self.folder, self.log = verb, inputs, folder, folder / "log.txt"
        self.draw, self.number = random.Random(seed), 0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def storage(self) -> Path:
        """A new disk: the outputs and, for `check`, the cache."""
        self.number += 1
        place = self.folder / f"disk-{self.number}"
        (place / "out").mkdir(parents=True)
        return place

    def on(self, storage: Path, place: str, **more: Any) -> str:
        """The verb, carried out in a process of its own: what it told."""
        answer = storage / "answer.txt"

        def run() -> None:
            os.environ["QDEPLOY_CACHE"] = str(storage / "cache")
            try:
                found = calls(self.inputs, storage / "out" / "made")[self.verb](on=place, **more)
                answer.write_text(told(found))
            except Planned as planned:
                answer.write_text(str(planned.folder))

        if code := ended(forked(run, self.log)):
            return f"exit code {code}: {self.log.read_text().strip().splitlines()[-1]}"
        return answer.read_text()

    def worker(self, storage: Path, plan: Path, part: str | None = None, own_mounts: bool = False) -> int:
        """A process that makes parts."""

        def run() -> None:
            os.environ["QDEPLOY_CACHE"] = str(storage / "cache")
            if own_mounts:
                if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NAMESPACE):
                    raise OSError(ctypes.get_errno(), "no namespace of mounts of its own")
                _command("mount", "--make-rprivate", "/")
            waited = part_folder.PartFolder.wait_for_storage

            def counting(parts: Any, error: Exception) -> None:
                (self.folder / f"waited-{os.getpid()}").touch()
                waited(parts, error)

            part_folder.PartFolder.wait_for_storage = counting  # type: ignore[method-assign]
            work(plan, part=part)

        return forked(run, self.log)

    def finish(self, storage: Path, plan: Path) -> str:
        """What the verb tells when all parts are there."""
        answer = storage / "answer.txt"

        def run() -> None:
            os.environ["QDEPLOY_CACHE"] = str(storage / "cache")
            answer.write_text(told(work(plan, finish=True).result))

        if code := ended(forked(run, self.log)):
            return f"exit code {code}: {self.log.read_text().strip().splitlines()[-1]}"
        return answer.read_text()

    def planned(self) -> tuple[Path, Path]:
        """New storage, and the plan on it."""
        storage = self.storage()
        return storage, Path(self.on(storage, "plan"))

    def wait_for_parts(self, plan: Path, workers: list[int]) -> None:
        """Wait until a random number of parts is there, and a little more."""
        count = json.loads((plan / "plan.json").read_text())["count"]
        wanted, end = self.draw.randrange(0, max(1, count - 2)), time.monotonic() + 120
        while len(list(plan.glob("parts/[0-9]*/part.json"))) < wanted and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(self.draw.uniform(0, 0.3))

    def shuffled(self) -> tuple[str, bool]:
        """``--part K/N`` in random order, one of them twice."""
        storage, plan = self.planned()
        shares = [f"{number}/3" for number in (1, 2, 3)]
        shares.append(self.draw.choice(shares))
        self.draw.shuffle(shares)
        codes = [ended(self.worker(storage, plan, share)) for share in shares]
        return self.finish(storage, plan), not any(codes)

    def disturbed(
        self, disturb: Callable[[Path, Path, int], int | None], own_mounts: bool
    ) -> tuple[str, bool]:
        """Two workers, of which the first is disturbed."""
        storage, plan = self.planned()
        workers = [self.worker(storage, plan, own_mounts=own_mounts), self.worker(storage, plan)]
        self.wait_for_parts(plan, workers)
        alive = os.waitpid(workers[0], os.WNOHANG)[0] == 0
        more = disturb(storage, plan, workers[0]) if alive else None
        waiting = [workers[1], *([] if more is None else [more]), *([workers[0]] if alive else [])]
        codes = [ended(each) for each in waiting]
        hit = (self.folder / f"waited-{workers[0]}").exists() if own_mounts else alive
        allowed = (0, -signal.SIGKILL) if more is not None else (0,)
        wrong = [code for code in codes if code not in allowed]
        return (f"exit codes {codes}" if wrong else self.finish(storage, plan)), hit

    def killed(self) -> tuple[str, bool]:
        """One is killed, and another one started."""

        def kill(storage: Path, plan: Path, victim: int) -> int:
            os.kill(victim, signal.SIGKILL)
            return self.worker(storage, plan)

        return self.disturbed(kill, own_mounts=False)

    def frozen(self) -> tuple[str, bool]:
        """One stands still until its leases are stale."""

        def freeze(storage: Path, plan: Path, victim: int) -> None:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(2 * FAST["STALE"])
            os.kill(victim, signal.SIGCONT)

        return self.disturbed(freeze, own_mounts=False)

    def cut_off(self) -> tuple[str, bool]:
        """One sees an empty disk for a while."""

        def cut(storage: Path, plan: Path, victim: int) -> None:
            inside = ("nsenter", "-t", str(victim), "-m")
            try:
                _command(*inside, "mount", "-t", "tmpfs", "none", str(storage))
            except subprocess.CalledProcessError:
                time.sleep(2)  # one that is ending has no namespace any more, and is not gone yet
                if _is_gone(victim):
                    return
                raise
            end = time.monotonic() + 60
            while not (self.folder / f"waited-{victim}").exists() and time.monotonic() < end:
                if _is_gone(victim):
                    return
                time.sleep(0.05)
            time.sleep(self.draw.uniform(0.5, 3))
            with suppress(subprocess.CalledProcessError):  # it may have ended
                _command(*inside, "umount", "-l", str(storage))

        return self.disturbed(cut, own_mounts=True)

    def ray(self, kills: int = 0) -> tuple[str, int]:
        """Two workers of Ray, with so many killed."""
        storage, killed = self.storage(), self.folder / f"killed-{self.number}"
        answer = storage / "answer.txt"

        def run() -> None:
            os.environ["QDEPLOY_CACHE"] = str(storage / "cache")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            gone: list[int] = []
            parts = (storage / "cache" / "evaluations" if self.verb == "check" else storage / "out").rglob
            killer = threading.Thread(
                target=_kill_some,
                args=(lambda: len(list(parts("part.json"))), kills, self.draw, gone),
                daemon=True,
            )
            killer.start()
            made = calls(self.inputs, storage / "out" / "made")[self.verb](on="ray", workers=2)
            answer.write_text(told(made))
            killed.write_text(str(len(gone)))

        if code := ended(forked(run, self.log)):
            return f"exit code {code}: {self.log.read_text().strip().splitlines()[-1]}", 0
        return answer.read_text(), int(killed.read_text())


def _is_gone(process: int) -> bool:
    """Whether a child has ended; it may still be waited for."""
    found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is not None


def _command(*words: str) -> None:
    program = shutil.which(words[0])
    if program is None:
        raise SystemExit(f"the form 'cut off' needs {words[0]}")
    subprocess.run([program, *words[1:]], check=True, capture_output=True)


def _kill_some(there: Callable[[], int], kills: int, draw: random.Random, gone: list[int]) -> None:
    """SIGKILL to some worker of Ray, each time one or two parts more are there."""
    import psutil

    while len(gone) < kills:
        wanted, end = there() + draw.choice((0, 1, 1, 2)), time.monotonic() + 60
        while there() < wanted and time.monotonic() < end:
            time.sleep(0.02)
        mine = [
            each
            for each in psutil.Process().children(recursive=True)
            if "ray::Worker.make" in " ".join(each.cmdline() or [])
        ]
        for each in draw.sample(mine, min(1, len(mine))):
            each.kill()
            gone.append(each.pid)
        time.sleep(0.1)


def prepare(inputs: Path) -> None:
    """A calibration set and a checkpoint of ``digits``, if they are not there."""

    def run() -> None:
        collect("digits", inputs / "set", samples=4, keep=2, steps=4)
        calibrate("digits", inputs / "checkpoint", calibration=inputs / "set", recipe="w8a8-minmax")

    inputs.mkdir(parents=True, exist_ok=True)
    if ended(forked(run, inputs / "log.txt")):
        raise SystemExit((inputs / "log.txt").read_text())


def main() -> None:
    """Run all forms for all verbs; exit code 1 if any result differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/lost-workers"))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--verbs", nargs="*", default=["sample", "collect", "sensitivity", "check"])
    parser.add_argument(
        "--forms", nargs="*", default=["shuffled", "killed", "frozen", "cut off", "ray", "ray killed"]
    )
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    prepare(given.folder / "inputs")
    rows: dict[str, Any] = (
        json.loads(given.output.read_text())["results"] if given.output and given.output.exists() else {}
    )
    for verb in given.verbs:
        bench = Bench(verb, given.folder / "inputs", given.folder / verb)
        began = time.perf_counter()
        alone = bench.on(bench.storage(), "here")
        row = rows.setdefault(verb, {})
        row |= {"sha256": alone, "seconds": round(time.perf_counter() - began, 1)}
        for form in given.forms:
            found: list[str] = []
            hits, began = 0, time.perf_counter()
            if form.startswith("ray"):
                kills = given.times if form == "ray killed" else 0
                while hits < kills or not found:
                    result, gone = bench.ray(min(kills - hits, KILLS_OF_A_RUN))
                    found.append(result)
                    hits += gone
                    if len(found) > 2 * given.times:
                        break
            else:
                for _ in range(given.times):
                    result, hit = getattr(bench, form.replace(" ", "_"))()
                    found.append(result)
                    hits += hit
            row[form] = {
                "runs": len(found),
                "disturbed": hits,
                "equal": found.count(alone),
                "others": sorted(set(found) - {alone}),
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(f"{verb}, {form}: {row[form]}", flush=True)
            if given.output:
                write_json(given.output, {"machine": machine(), "results": rows})
            for disk in bench.folder.glob("disk-*"):
                shutil.rmtree(disk, ignore_errors=True)
    forms = [form for row in rows.values() for form in row.values() if isinstance(form, dict)]
    wrong = sum(form["runs"] - form["equal"] for form in forms)
    print(f"{wrong} results differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
