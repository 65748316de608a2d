"""Interleaved timing: engines are timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qdeploy.engines.base import Engine
from qdeploy.system.progress import track

if TYPE_CHECKING:
    from torch import Tensor

# A turn is as many calls as fit into this time: short calls are not drowned by the first one's cold caches.
TURN_SECONDS = 0.01
MOST_CALLS = 50
LEAST_ROUNDS = 3


def take_turns(
    engines: Mapping[str, Engine],
    inputs: Mapping[str, Mapping[str, Tensor]],
    rounds: int,
    seconds: float,
    what: str,
) -> dict[str, list[list[float]]]:
    """Times of single calls in ms, by engine and round."""
    for name, engine in engines.items():
        for _ in range(2):  # the first call compiles, the second one fills the caches
            engine(inputs[name])
    turns: dict[str, list[list[float]]] = {name: [] for name in engines}
    order, end = list(engines), time.perf_counter() + seconds
    for number_of_round in track(range(rounds), what):
        if number_of_round >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            turns[name].append(_turn(engines[name], inputs[name]))
        order.append(order.pop(0))  # no engine always follows the same other one
    return turns


def _turn(engine: Engine, inputs: Mapping[str, Tensor]) -> list[float]:
    took: list[float] = []
    began = time.perf_counter()
    engine(inputs)  # not counted: the caches are still full of the last engine's weights
    end = max(time.perf_counter(), began) + TURN_SECONDS
    while not took or (time.perf_counter() < end and len(took) < MOST_CALLS):
        took.append(milliseconds(engine, inputs))
    return took


def milliseconds(engine: Callable[..., object], inputs: Mapping[str, Tensor]) -> float:
    """Time of a call, by the engine's own clock where it has one: GPUs finish after the call returns."""
    if isinstance(engine, Engine):
        return engine.timed(inputs)
    began = time.perf_counter()
    engine(inputs)
    return (time.perf_counter() - began) * 1e3


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
