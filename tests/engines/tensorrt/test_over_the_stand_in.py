"""The runtime, executed through TensorRT's real bindings; see `scenarios.py`."""

from __future__ import annotations

import pytest

from tests.engines.tensorrt.stand_in import StandIn


@pytest.fixture(scope="session")
def played(stand_in: StandIn) -> dict[str, object]:
    return stand_in.scenarios()


def test_every_scenario_holds(played: dict[str, object]) -> None:
    assert played["failed"] == {}
    assert len(played["scenes"]) >= 20


def test_the_calls_were_really_native(played: dict[str, object]) -> None:
    assert played["recorded"] > 150


def test_the_whole_engine_holds(stand_in: StandIn) -> None:
    done = stand_in.run("-m", "tests.engines.tensorrt.engine_scenes", stand_in.folder / "libnvinfer.so.11")
    assert done.stdout == "held\n", done.stderr[-3000:]
