"""Take a tiny random pipeline of every class of `tests.models.catalogue` from preflight to check.

    python tools/compatibility.py                 those that have no result yet, then docs/compatibility.md
    python tools/compatibility.py --only Flux     those with a word in their names, again
    python tools/compatibility.py --page          the page alone

Each runs in a child process with a time limit. Results are written after each, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
LIMIT = 240.0  # seconds for a pipeline
STEPS = 3
VERBS = ("preflight", "collect", "calibrate", "export", "build-engine", "sample", "check")

sys.path.insert(0, str(ROOT))


def run_one(name: str, folder: Path, verbs: tuple[str, ...] = VERBS) -> dict[str, Any]:
    """Take one pipeline through the verbs.

    Args:
        name: in the catalogue.
        folder: for its artifacts.
        verbs: how far to go.

    Returns:
        ``passed``; ``reached``, the verb that failed or the last one; ``sentence``, why; ``internal``, whether the
        error was none that qdeploy foresees; ``parity`` and ``sqnr`` in dB; ``seconds``.
    """
    from qdeploy.system.errors import QDeployError

    began, reached, found = time.perf_counter(), "make", {}
    try:
        for reached, step in _steps(name, folder):
            if reached not in ("make", *verbs):
                break
            found |= step() or {}
        result: dict[str, Any] = {"passed": True, "reached": verbs[-1], "sentence": None, "internal": False}
    except QDeployError as error:
        result = {"passed": False, "reached": reached, "sentence": str(error), "internal": False}
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        result = {"passed": False, "reached": reached, "sentence": said, "internal": True}
    sentence = result["sentence"]
    result["sentence"] = (
        None if sentence is None else " ".join(sentence.replace(str(folder), "").split())[:400]
    )
    return {**result, **found, "seconds": round(time.perf_counter() - began, 1)}


def _steps(name: str, folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]:
    """The verbs, each as a function; those of later ones use what earlier ones made."""
    import qdeploy
    from qdeploy.system.errors import InvalidInputError
    from qdeploy.system.machine import int8_sums_saturate
    from tests.models.catalogue import ENTRIES

    model, made, options = folder / "model", {}, {}

    def make() -> None:
        options.update(ENTRIES[name].write(model))
        options["batch"] = min(2, options.get("batch", 2))
        options.setdefault("steps", STEPS)

    def preflight() -> None:
        result = qdeploy.preflight(model, **options)
        if not result.passed:
            raise InvalidInputError(str(result.problem))

    def collect() -> None:
        made["set"] = qdeploy.collect(model, folder / "set", samples=4, keep=2, **options)

    def calibrate() -> None:
        asked = {"recipe": "w8a8-minmax", "effort": "fast", "calibration": made["set"]}
        weights = {"weights": "int7"} if int8_sums_saturate() else {}
        made["checkpoint"] = qdeploy.calibrate(model, folder / "w8a8", **asked, **weights)

    def export() -> None:
        made["onnx"] = qdeploy.export(made["checkpoint"], folder / "onnx", components=False)

    def build() -> None:
        made["engine"] = qdeploy.build_engine(made["onnx"], folder / "engine", backend="openvino", threads=1)

    def sample() -> None:
        qdeploy.sample(made["engine"], folder / "samples", model=model, samples=2, **options)

    def check() -> dict[str, Any]:
        told = qdeploy.check(made["engine"], checkpoint=made["checkpoint"])
        if not told.passed:
            raise InvalidInputError("; ".join(told.failures))
        numbers = {"parity": told.parity["sqnr_db"], "sqnr": told.quality["sqnr_db"]["median"]}
        return {key: round(min(999.0, value), 1) for key, value in numbers.items()}

    yield "make", make
    yield from zip(VERBS, (preflight, collect, calibrate, export, build, sample, check), strict=True)


def _child(name: str, pipe: Any) -> None:
    with TemporaryDirectory() as scratch:
        pipe.send(run_one(name, Path(scratch)))


def in_a_child(name: str, limit: float) -> dict[str, Any]:
    """`run_one` in a process of its own, which is killed at the limit; it inherits what is imported here."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(name, there))
    child.start()
    try:
        if here.poll(limit):
            result: dict[str, Any] = here.recv()
            return result
        sentence = f"stopped after {limit:g} s" if child.is_alive() else "the process died"
        return {"passed": False, "reached": "?", "sentence": sentence, "internal": True, "seconds": limit}
    except EOFError:
        return {
            "passed": False,
            "reached": "?",
            "sentence": "the process died",
            "internal": True,
            "seconds": 0,
        }
    finally:
        child.kill()
        child.join()


@contextmanager
def _prepared() -> Iterator[None]:
    """Everything heavy is imported once, and engines are built without timing them."""
    import torch

    torch.set_num_threads(1)
    import diffusers
    import openvino  # noqa: F401
    import transformers

    import qdeploy.engines.measure_build as building
    from qdeploy.engines.measure import latency
    from qdeploy.system.progress import verbosity

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    verbosity.level = 0
    stock, building.latency = building.latency, partial(latency, seconds=0.0)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        building.latency = stock  # type: ignore[attr-defined]


def page(results: dict[str, Any]) -> str:
    """``docs/compatibility.md``."""
    pipelines = results["pipelines"]
    tried = {name: found for name, found in pipelines.items() if found["reached"] != "make"}
    passed = [name for name, found in tried.items() if found["passed"]]
    internal = [name for name, found in tried.items() if found["internal"]]
    lines = [
        "# Which pipelines work",
        "",
        "`make compatibility` wrote this page. It takes a tiny random pipeline of each class, in three sampling",
        f"steps, through {' → '.join(VERBS)}: min-max calibration to W8A8, an OpenVINO engine, sampled in the stock",
        "pipeline. It says that calls, structure, graph and engine are right; what a format costs a trained model it",
        "does not say. Pipelines of `tests/models/catalogue` that have no result yet are not listed.",
        "",
        f"With diffusers {results['diffusers']}: {len(tried)} pipelines tried, {len(passed)} passed whole, "
        f"{len(internal)} ended in an internal error.",
        "",
        "| pipeline | came to | parity, dB | SQNR, dB | why not further |",
        "|---|---|---:|---:|---|",
    ]
    for name, found in sorted(tried.items(), key=lambda each: (not each[1]["passed"], each[0])):
        came = "the end" if found["passed"] else found["reached"]
        numbers = " | ".join(str(found.get(key, "")) for key in ("parity", "sqnr"))
        why = (found["sentence"] or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {came} | {numbers} | {why} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what has no result yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="words in names: those again")
    parser.add_argument("--failed", action="store_true", help="those that did not pass, again")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a pipeline")
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so long")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"pipelines": {}}
    if not given.page:
        began = time.monotonic()
        with _prepared():
            import diffusers

            from tests.models.catalogue import ENTRIES

            results["diffusers"] = diffusers.__version__
            known = results["pipelines"]
            for name in ENTRIES:
                again = any(word in name for word in given.only or ())
                again |= given.failed and name in known and not known[name]["passed"]
                if not again and (name in known or given.only or given.failed):
                    continue
                if time.monotonic() - began > given.minutes * 60:
                    break
                known[name] = in_a_child(name, given.limit)
                print(name, known[name], flush=True)
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
