"""One engine, many threads, many calls: answers stay right and memory does not grow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from qdeploy.engines.base import Engine
from qdeploy.engines.build import load_engine
from qdeploy.engines.openvino import OpenVINOEngine
from qdeploy.engines.pool import Pool
from tests.engines.bundles import example_inputs

THREADS, CALLS = 16, 50


def _resident() -> int:
    """Bytes of memory that the process holds now."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def _request(number: int) -> dict[str, torch.Tensor]:
    """Rows, values and timesteps that differ from thread to thread and from call to call."""
    inputs = example_inputs(1 + number % 3)
    generator = torch.Generator().manual_seed(number)
    return {
        "sample": torch.randn(inputs["sample"].shape, generator=generator),
        "timestep": torch.tensor(float(number % 7)),
    }


def test_many_threads_get_what_one_thread_gets(engine: Engine) -> None:
    expected = [engine(_request(number)) for number in range(CALLS)]
    together = Barrier(THREADS)

    def calls(thread: int) -> list[int]:
        together.wait()
        order = [(thread * 7 + call) % CALLS for call in range(CALLS)]
        return [number for number in order if not torch.equal(engine(_request(number)), expected[number])]

    with ThreadPoolExecutor(THREADS) as threads:
        wrong = list(threads.map(calls, range(THREADS)))
    assert wrong == [[]] * THREADS


@pytest.mark.parametrize("engine_folder", ["openvino"], indirect=True)
def test_threads_that_meet_a_shape_first_compile_it_once(engine_folder: Path) -> None:
    with load_engine(engine_folder) as engine:
        assert isinstance(engine, OpenVINOEngine)
        together = Barrier(8)

        def call(_: int) -> None:
            together.wait()
            engine(example_inputs(2))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(call, range(8)))
        (compiled,) = engine.shaped.compiled.values()
        assert 1 <= compiled.requests.made <= 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_two_thousand_calls_hold_no_more_memory_than_a_hundred(engine: Engine) -> None:
    inputs = _request(1)
    for _ in range(100):
        engine(inputs)
    before = _resident()
    for _ in range(2000):
        engine(inputs)
    # What leaked 1 KiB a call would have grown by twice this.
    assert _resident() - before < 2**20


def test_a_pool_makes_as_many_members_as_are_used_at_the_same_time() -> None:
    pool = Pool(object)
    for _ in range(3):
        with pool.take() as first:
            pass
    assert pool.made == 1
    with pool.take() as one, pool.take() as other:
        assert one is first
        assert one is not other
    assert pool.made == 2
    with pytest.raises(ValueError, match="inside"), pool.take():
        raise ValueError("inside")
    with pool.take(), pool.take():
        pass
    assert pool.made == 2
