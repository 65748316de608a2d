"""Many mutated inputs, counted by kind and outcome: ``python -m tools.fuzz --count 2000 --output FILE``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from qdeploy.system.progress import verbosity
from qdeploy.version import __version__
from tests.fuzzing import MOST_MEMORY, Subjects, outcome


def main() -> int:
    """Run them; 1 if one of them was neither accepted nor refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz.json"))
    given = parser.parse_args()
    verbosity.level = 0
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        subjects = Subjects(Path(folder), whole=True)
        began, used = time.monotonic(), time.process_time()
        for seed in range(given.first, given.first + given.count):
            if time.monotonic() - began > given.seconds:
                break
            with tempfile.TemporaryDirectory() as work:
                kind, found, why = outcome(seed, subjects, Path(work))
            counts.setdefault(kind, Counter())[found] += 1
            done += 1
            if why:
                wrong.append(why)
                print(why, file=sys.stderr, flush=True)
    total: Counter[str] = sum(counts.values(), Counter())
    report = {
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tools.fuzz --first {given.first} --count {given.count}",
        "seconds": round(time.process_time() - used),
        "most_memory": MOST_MEMORY,
        "seeds": [given.first, given.first + done],
        "total": dict(sorted(total.items())),
        "by_kind": {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())},
        "wrong": wrong,
    }
    given.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["total"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
