"""A contender in a process of its own: what it answers, and how it is asked."""

from __future__ import annotations

import multiprocessing
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Case, contenders
from benchmarks.contenders.profile import int8_share, kernel_times
from qdeploy.system.memory import peak_memory

# Seconds of a call beyond which the caches that other contenders have emptied do not matter.
LONG = 1.0


def rows_as_batch(inputs: dict[str, Tensor], first: int, batch: int) -> dict[str, Tensor]:
    """One row as a batch of equal ones, with its timestep as a scalar."""
    rows = (first + torch.zeros(batch)).long()
    return {
        name: x[first].float().reshape(()) if name == "timestep" else x[rows] for name, x in inputs.items()
    }


def serve(pipe: Connection, name: str, case: Case, batch: int) -> None:
    """A contender's process: answers what it is asked."""
    torch.set_num_threads(case.threads)
    contender = contenders()[name]
    while True:
        question, given = pipe.recv()
        try:
            if question == "prepare":
                pipe.send(contender.prepare(case) if contender.prepare is not None else None)
            elif question == "load":
                inputs, began = given, time.perf_counter()
                loaded = contender.load(case)
                loaded.call(rows_as_batch(inputs, 0, batch))
                pipe.send(time.perf_counter() - began)
            elif question == "outputs":
                rows = [loaded.call(rows_as_batch(inputs, i, batch))[:1].clone() for i in range(given)]
                pipe.send(torch.cat(rows).numpy())
            elif question == "turn":
                took = [_timed(loaded.call, inputs, batch)]
                if took[0][0] < LONG * 1e3:
                    took.clear()
                took += [_timed(loaded.call, inputs, batch) for _ in range(given - len(took))]
                pipe.send(took)
            elif question == "memory":
                peak = peak_memory()
                pipe.send(None if peak is None else peak / 2**20)
            elif question == "kernels":
                told = None
                if loaded.ir is not None:
                    x = rows_as_batch(inputs, 0, batch)
                    told = kernel_times(loaded, x, case.threads, given) | int8_share(loaded, x, case)
                pipe.send(told)
            else:
                return
        except Exception as error:
            pipe.send(error)


def _timed(call: Any, inputs: dict[str, Tensor], batch: int) -> tuple[float, float]:
    """Milliseconds of a call: by the clock, and of the processor for all threads of this process."""
    x = rows_as_batch(inputs, 0, batch)
    began, used = time.perf_counter(), time.process_time()
    call(x)
    return (time.perf_counter() - began) * 1e3, (time.process_time() - used) * 1e3


class Process:
    """A contender's process, from the parent's side."""

    def __init__(self, name: str, case: Case, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name, case, batch), daemon=True)
        self._process.start()
        other.close()  # so that a process that is killed ends the pipe

    def ask(self, question: str, given: Any = None) -> Any:
        """The answer; raises what the contender raised, and EOFError if its process is gone."""
        self._pipe.send((question, given))
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Let the process go."""
        with suppress(OSError):  # it is gone already
            self._pipe.send(("end", None))
        self._process.join(10)
        self._process.kill()
