"""Time and cost of 50,000 images on 1 to 1,000 workers, and of a fleet of engines: a model, fed by measured times.

    python -m benchmarks.cluster_model measure -o times.json          # real runs with 1 and 2 workers
    python -m benchmarks.cluster_model predict times.json -o benchmarks/results/cluster-model.json

Workers start (they load packages and a model), and then make parts. *Static* ranks own every N-th part, and one that
is lost ends the job; a *queue* gives the next part to whoever is free. Spot machines are lost at random, with a mean
time between losses, and the part at hand with them; parts that are on shared storage stay. The fleet: requests arrive
at random; an engine takes what waits, up to its largest batch, and serves it in one call.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from qdeploy.store.files import write_json
from qdeploy.system.machine import machine

IMAGES = 50_000
STORAGE = 1e9  # bytes a second of the shared storage, for all together
MOST_STARTS = 1_000  # of a job that ends with each lost rank; beyond, it never ends


@dataclass(frozen=True)
class Times:
    """What was measured.

    Attributes:
        load: seconds from the start of a worker until it makes parts: imports, the model, the first call.
        part: seconds for a part.
        finish: seconds for merging one part.
        bytes: of a part on shared storage.
        images: in a part.
        spread: deviation of a part's time, by its mean.
    """

    load: float
    part: float
    finish: float
    bytes: int
    images: int
    spread: float = 0.15


class Workers:
    """Workers of one job, at simulated times.

    Args:
        times: what was measured.
        between_losses: mean seconds until a worker is lost; never if None.
        seed: of losses and of the spread.
    """

    def __init__(self, times: Times, between_losses: float | None = None, seed: int = 0) -> None:
        self.times, self.between, self.lost = times, between_losses, 0
        self._draw = random.Random(seed)

    def _part(self) -> float:
        return self.times.part * max(0.1, self._draw.gauss(1, self.times.spread))

    def _life(self, workers: int = 1) -> float:
        return math.inf if self.between is None else self._draw.expovariate(workers / self.between)

    def queue(self, parts: int, workers: int) -> float:
        """Seconds until all parts are made: the next part goes to whoever is free, and who is lost is replaced."""
        free = [(self.times.load, self._life()) for _ in range(min(workers, parts))]
        heapq.heapify(free)
        end = 0.0
        for _ in range(parts):
            ready, lost = heapq.heappop(free)
            took = self._part()
            while ready + took > lost:
                self.lost += 1
                ready, lost = lost + self.times.load, lost + self._life()
            end = max(end, ready + took)
            heapq.heappush(free, (ready + took, lost))
        return end

    def static(self, parts: int, workers: int) -> float:
        """The same for ranks with every N-th part each: one that is lost ends the job, and all begin anew."""
        left = [len(range(rank, parts, workers)) for rank in range(min(workers, parts))]
        begin = 0.0
        while self.lost < MOST_STARTS:
            lost, end = begin + self._life(len(left)), begin
            for rank, own in enumerate(left):
                now = begin + self.times.load
                for _ in range(own):
                    now += self._part()
                    if now > lost:
                        break
                    left[rank] -= 1
                    end = max(end, now)
            if not any(left):
                return end
            self.lost, begin = self.lost + 1, lost
        return math.inf


def makespan(times: Times, parts: int, made: float, storage: float | None = None) -> float:
    """Seconds with the finish, which merges all parts, and no faster than the shared storage, in bytes a second."""
    moved = 0.0 if storage is None else 2 * parts * times.bytes / storage  # written once, read once
    return max(made, moved) + times.finish * parts


def fleet(
    engines: int, rate: float, call: Callable[[int], float], largest: int, requests: int = 5000, seed: int = 0
) -> dict[str, float]:
    """What a fleet gives at an arrival rate.

    Args:
        engines: how many.
        rate: requests a second.
        call: seconds of a call by its batch.
        largest: batch of a call.
        requests: to simulate.
        seed: of the arrivals.

    Returns:
        Median and 95th percentile of the time from arrival to answer, in seconds; the mean batch; and the share of
        time that engines are busy.
    """
    draw, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        arrivals.append(now)
    free = [0.0] * engines
    heapq.heapify(free)
    waits, batches, busy, first = [], [], 0.0, 0
    while first < requests:
        begin = max(heapq.heappop(free), arrivals[first])
        last = first
        while last < requests and arrivals[last] <= begin and last - first < largest:
            last += 1
        took = call(last - first)
        waits += [begin + took - arrivals[each] for each in range(first, last)]
        batches.append(last - first)
        busy += took
        heapq.heappush(free, begin + took)
        first = last
    cuts = quantiles(waits, n=20)
    return {
        "median_s": round(cuts[9], 3),
        "p95_s": round(cuts[18], 3),
        "batch": round(mean(batches), 2),
        "busy": round(min(1.0, busy / engines / max(free)), 3),
    }


def predict(measured: dict[str, Any]) -> dict[str, Any]:
    """All predictions; `held` are those beside which something was measured."""
    times = Times(**measured["times"])
    parts = -(-IMAGES // times.images)
    rows = []
    for count, hours, split in product((1, 2, 8, 64, 256, 1000), (None, 4.0), ("static", "queue")):
        workers = Workers(times, None if hours is None else hours * 3600)
        made = getattr(workers, split)(parts, count)
        seconds = makespan(times, parts, made, STORAGE)
        rows.append(
            {
                "workers": count,
                "split": split,
                "hours_between_losses": hours,
                "seconds": round(seconds, 1) if math.isfinite(seconds) else None,
                "worker_hours": round(made * count / 3600, 2) if math.isfinite(made) else None,
                "lost": workers.lost,
            }
        )
    held = []
    for run in measured["runs"]:
        seconds = makespan(times, run["parts"], Workers(times).queue(run["parts"], run["workers"]))
        held.append({**run, "predicted": round(seconds, 1), "ratio": round(seconds / run["seconds"], 3)})
    per_image = times.part / times.images
    rates = [share / per_image for share in (0.3, 0.7, 0.9)]

    def call(batch: int) -> float:
        return per_image * batch

    serving = [
        {
            "engines": engines,
            "requests_per_s": round(rate * engines, 3),
            **fleet(engines, rate * engines, call, 16),
        }
        for engines in (1, 4, 16)
        for rate in rates
    ]
    return {
        "note": "a model fed by measured times; `held` stands beside real runs, the rest is predicted",
        "machine": machine(),
        "times": asdict(times),
        **{name: value for name, value in measured.items() if name not in ("times", "runs")},
        "held": held,
        "batch": {"images": IMAGES, "parts": parts, "storage_bytes_per_s": STORAGE, "rows": rows},
        "fleet": {"call": "seconds in proportion to the batch, of 16 at most", "rows": serving},
    }


def measure(samples: int, batch: int, steps: int) -> dict[str, Any]:
    """Runs of `sample` on ``digits`` on Ray, and from other runs the times that the model needs."""
    import ray

    from qdeploy.parts.plan import open_job
    from qdeploy.sampling.sample import sample
    from qdeploy.system.errors import Planned

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: dict[str, Any] = {"batch": batch, "steps": steps}
        try:
            sample("digits", folder / "times", samples=4 * batch, on="plan", **options)
        except Planned as planned:
            job = open_job(planned.folder)
        took, busy_parts = [], []
        with job.parts() as parts:
            for number in range(job.count):
                began = time.process_time()
                took.append(_seconds(lambda number=number: parts.keep(number, job.make)))  # type: ignore[misc]
                busy_parts.append(time.process_time() - began)
            size = sum(file.stat().st_size for file in parts.path(1).iterdir())
        finish = (
            _seconds(lambda: sample("digits", folder / "times", samples=4 * batch, **options)) / job.count
        )
        part = mean(took[1:])
        init = _seconds(
            lambda: ray.init(
                num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False
            )
        )
        with _Busy() as starting:
            one = _seconds(
                lambda: sample("digits", folder / "one", samples=batch, on="ray", workers=1, **options)
            )
        load = max(0.0, one - part - finish)
        times = Times(round(load, 3), round(part, 3), round(finish, 3), size, batch)
        runs = []
        for workers in (1, 2):
            output = folder / f"images-{workers}"
            with _Busy() as busy:
                seconds = _seconds(
                    lambda: sample("digits", output, samples=samples, on="ray", workers=workers, **options)  # noqa: B023
                )
            runs.append(
                {
                    "workers": workers,
                    "parts": -(-samples // batch),
                    "seconds": round(seconds, 1),
                    "processor_seconds": busy.seconds(),
                }
            )
            print(runs[-1], flush=True)
        ray.shutdown()
    return {
        "times": asdict(times),
        "runs": runs,
        "ray_start_seconds": round(init, 1),
        "start_processor_seconds": starting.seconds(),
        "speed_up": _speed_up(runs, load, starting.seconds()[0] - mean(busy_parts[1:])),
    }


class _Busy:
    """Seconds of the processor that Ray's workers of this process take, looked at five times a second."""

    def __init__(self) -> None:
        self._found: dict[int, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Busy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        import psutil

        while not self._end.wait(0.2):
            for each in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "ray::Worker" in " ".join(each.cmdline()):
                        used = each.cpu_times()
                        self._found[each.pid] = used.user + used.system

    def seconds(self) -> list[float]:
        """Of each worker."""
        return [round(used, 1) for used in self._found.values()]


def _speed_up(runs: list[dict[str, Any]], load: float, load_busy: float) -> dict[str, float]:
    """Of two workers over one, after start-up: of the clock, and of the busier worker's processor time.

    The latter does not see what else the machine does.
    """
    one, two = runs
    return {
        "clock": round((one["seconds"] - load) / (two["seconds"] - load), 2),
        "processor": round(
            (max(one["processor_seconds"]) - load_busy) / (max(two["processor_seconds"]) - load_busy), 2
        ),
        "with_start_up": round(one["seconds"] / two["seconds"], 2),
    }


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring, predicting = commands.add_parser("measure"), commands.add_parser("predict")
    for name, default in {"samples": 512, "batch": 32, "steps": 20}.items():
        measuring.add_argument(f"--{name}", type=int, default=default)
    predicting.add_argument("measured", type=Path)
    for each in (measuring, predicting):
        each.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "measure":
        write_json(given.output, measure(given.samples, given.batch, given.steps))
        return
    measured = json.loads(given.measured.read_text())
    write_json(given.output, predict(measured))


if __name__ == "__main__":
    main()
