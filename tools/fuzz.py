"""Many mutated inputs, counted by kind and outcome: ``python -m tools.fuzz --count 2000 --output FILE``.

Inputs are tried in processes of their own, so that one that ends its process (a fault of a native parser) is
counted as a ``crash``, and one that a signal of Python's cannot stop as a ``hang``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from qdeploy.system.progress import verbosity
from qdeploy.version import __version__
from tests.fuzzing import LONGEST, MOST_MEMORY, Subjects, outcome

PATIENCE = 10 * LONGEST  # seconds by the clock until a process is killed that does not answer


def _answer(connection: Connection, subjects: Subjects) -> None:
    """Try each seed that comes; end with the connection."""
    verbosity.level = 0
    while True:
        try:
            seed = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as work:
            connection.send(outcome(seed, subjects, Path(work)))


class Worker:
    """A process that tries one seed at a time."""

    def __init__(self, subjects: Subjects) -> None:
        context = multiprocessing.get_context("spawn")  # native libraries do not survive a fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_answer, args=(other, subjects), daemon=True)
        self.process.start()
        other.close()
        self.seed, self.since = -1, 0.0

    def give(self, seed: int) -> None:
        """Send the next seed."""
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def take(self) -> tuple[str, str, str] | None:
        """The outcome of the last seed; `None` if the process is no more."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return None


def outcomes(seeds: Iterator[int], subjects: Subjects, workers: int) -> Iterator[tuple[int, str, str, str]]:
    """For each seed its number, kind, outcome, and what is wrong with that; as they come.

    Args:
        seeds: the numbers of the inputs.
        subjects: what is mutated.
        workers: processes that try inputs.
    """
    busy: list[Worker] = []

    def next_seed(worker: Worker) -> None:
        seed = next(seeds, None)
        if seed is not None:
            worker.give(seed)
            busy.append(worker)

    for _ in range(workers):
        next_seed(Worker(subjects))
    while busy:
        ready = wait([worker.connection for worker in busy], timeout=1)
        for worker in list(busy):
            late = time.monotonic() - worker.since > PATIENCE
            if worker.connection not in ready and not late:
                continue
            busy.remove(worker)
            if late and worker.connection not in ready:
                worker.process.kill()
            found = worker.take()
            if found is None:
                code = worker.process.exitcode
                what = ("hang", f"no answer in {PATIENCE} s") if late else ("crash", f"exit code {code}")
                yield worker.seed, "?", what[0], f"seed {worker.seed}: {what[1]}"
                worker = Worker(subjects)
            else:
                yield worker.seed, *found
                if found[1] == "hang":  # it was interrupted anywhere, and may be left in any state
                    worker.process.kill()
                    worker = Worker(subjects)
            next_seed(worker)


def main() -> int:
    """Run them; 1 if one of them was neither accepted nor refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz.json"))
    given = parser.parse_args()
    verbosity.level = 0
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        subjects = Subjects(Path(folder), whole=True)
        began = time.monotonic()

        def seeds() -> Iterator[int]:
            for seed in range(given.first, given.first + given.count):
                if time.monotonic() - began > given.seconds:
                    return
                yield seed

        for _, kind, found, why in outcomes(seeds(), subjects, given.workers):
            counts.setdefault(kind, Counter())[found] += 1
            if why:
                wrong.append(why)
                print(f"{kind}: {why}", file=sys.stderr, flush=True)
    total: Counter[str] = sum(counts.values(), Counter())
    report = {
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tools.fuzz --first {given.first} --count {given.count}",
        "minutes": round((time.monotonic() - began) / 60),
        "most_memory": MOST_MEMORY,
        "seeds": [given.first, given.first + total.total()],
        "total": dict(sorted(total.items())),
        "by_kind": {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())},
        "wrong": wrong,
    }
    given.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["total"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
