"""The model of clusters agrees with what can be said without it."""

from __future__ import annotations

import math

import pytest

from benchmarks.cluster_model import Times, Workers, fleet, makespan, predict

EVEN = Times(load=10, part=2, finish=0.0, bytes=1000, images=16, spread=0.0)


@pytest.mark.parametrize("split", ["static", "queue"])
@pytest.mark.parametrize(("parts", "workers", "seconds"), [(8, 1, 26), (8, 2, 18), (9, 2, 20), (3, 100, 12)])
def test_without_spread_or_losses_it_is_arithmetic(
    split: str, parts: int, workers: int, seconds: float
) -> None:
    assert getattr(Workers(EVEN), split)(parts, workers) == pytest.approx(seconds)


def test_a_queue_is_never_much_slower_and_survives_losses() -> None:
    times = Times(load=60, part=30, finish=0.0, bytes=1, images=16, spread=0.3)
    for hours in (None, 4.0):
        between = None if hours is None else hours * 3600
        queue, static = Workers(times, between), Workers(times, between)
        assert queue.queue(3125, 256) <= static.static(3125, 256) + times.part
    assert queue.lost > 0
    assert math.isinf(Workers(times, 60.0).static(3125, 256))
    assert math.isfinite(Workers(times, 600.0).queue(3125, 256))


def test_storage_and_the_finish_are_limits() -> None:
    assert makespan(EVEN, 1000, 5.0, storage=1000) == pytest.approx(2000)
    assert makespan(Times(0, 1, 0.5, 1, 1), 10, 7.0) == pytest.approx(12)


def test_a_fleet_answers_at_once_where_nothing_waits_and_batches_where_it_does() -> None:
    idle = fleet(4, 0.01, lambda batch: 1.0, 16, requests=500)
    assert idle["p95_s"] == pytest.approx(1.0, abs=0.05)
    assert idle["batch"] == pytest.approx(1.0, abs=0.02)
    full = fleet(1, 8.0, lambda batch: 1.0, 16, requests=2000)
    assert 5 < full["batch"] <= 16
    assert 1.0 < full["median_s"] <= full["p95_s"] < 3.0


def test_predictions_stand_beside_what_was_measured() -> None:
    times = {"load": 10.0, "part": 2.0, "finish": 0.0, "bytes": 1000, "images": 500, "spread": 0.0}
    made = predict({"times": times, "runs": [{"workers": 2, "parts": 8, "seconds": 20.0}]})
    assert made["held"] == [{"workers": 2, "parts": 8, "seconds": 20.0, "predicted": 18.0, "ratio": 0.9}]
    assert made["batch"]["parts"] == 100
    assert {row["workers"] for row in made["batch"]["rows"]} == {1, 2, 8, 64, 256, 1000}
