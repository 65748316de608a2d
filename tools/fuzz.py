"""Many mutated inputs, counted by kind and outcome: ``python tools/fuzz.py --count 2000 --output FILE``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from qdeploy.version import __version__
from tests.fuzzing import Subjects, outcome


def main() -> int:
    """Run them; 1 if there was an internal error or a hang."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz.json"))
    given = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        subjects = Subjects(Path(folder))
        began = time.monotonic()
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
