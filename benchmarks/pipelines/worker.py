"""A contender in a process of its own, of whichever Python it needs: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.pipelines import Case, Opened, contenders

ROOT = Path(__file__).parent.parent.parent


def serve(name: str, case: Case) -> None:
    """Answer what is asked, until nothing more is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    contender, opened = contenders()[name], None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["ask"] == "prepare":
                if contender.prepare is not None:
                    contender.prepare(case)
                answer: dict[str, Any] = {}
            elif question["ask"] == "open":
                began, used = time.perf_counter(), time.process_time()
                opened = contender.open(case)
                answer = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - used}
            elif question["ask"] == "image" and opened is not None:
                answer = _image(opened, case, question)
            else:
                answer = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        except Exception as error:  # whatever a contender raises is its result
            answer = {"error": next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _image(opened: Opened, case: Case, asked: dict[str, Any]) -> dict[str, Any]:
    """One picture in a PNG file: seconds by the clock and of the processor, for all threads, and of its parts."""
    for part in opened.parts:
        opened.parts[part] = 0.0
    prompt = case.prompts[asked["image"] % len(case.prompts)]
    began, used = time.perf_counter(), time.process_time()
    opened.image(prompt, asked["image"], asked["steps"]).save(asked["file"])
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {"s": seconds, "cpu_s": cpu, "parts_ms": dict(opened.parts)}


class ContenderFailed(Exception):
    """What a contender said instead of an answer."""


class Process:
    """A contender's process, from the parent's side.

    Args:
        python: the interpreter that it needs.
        name: of the contender.
        case: what it is given.
        log: file of what it prints.
    """

    def __init__(self, python: Path, name: str, case: Case, log: Path) -> None:
        known = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(case.threads), "HF_HUB_OFFLINE": "1"}
        command = [str(python), "-m", "benchmarks.pipelines.worker", name, json.dumps(asdict(case))]
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **known},
                cwd=case.folder,
            )

    def ask(self, question: str, **details: Any) -> dict[str, Any]:
        """The answer.

        Raises:
            ContenderFailed: it failed, or its process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"ask": question, **details}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ContenderFailed(f"its process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(answer["error"])
        return answer

    def end(self) -> None:
        """Let the process go."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    serve(sys.argv[1], Case(**{**given, "prompts": tuple(given["prompts"])}))
