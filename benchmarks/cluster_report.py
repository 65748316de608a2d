"""Tables of what `benchmarks.cluster_model` measured and predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdeploy.system.tables import MISSING, Table


def tables(content: Mapping[str, Any]) -> str:
    """Real runs beside their prediction; 50,000 images on clusters; a fleet of engines."""
    times, speed = content["times"], content["speed_up"]
    return "\n".join(
        [
            f"A worker takes {times['load']:.1f} s until it makes parts, {times['part']:.2f} s for a part of "
            f"{times['images']} images, and the finish {1e3 * times['finish']:.0f} ms for each part. Ray starts in "
            f"{content['ray_start_seconds']:.1f} s. Two workers on two cores are {speed['clock']:.2f} times as fast "
            f"as one after the start, {speed['with_start_up']:.2f} times with it.\n",
            _held(content["held"]).markdown(),
            "\n## 50,000 images\n",
            _batch(content["batch"]["rows"]).markdown(),
            "\n## A fleet that serves\n",
            "Requests arrive at random; a call takes what waits, 16 at most, in proportion to its batch.\n",
            _fleet(content["fleet"]["rows"]).markdown(),
        ]
    )


def _held(runs: list[dict[str, Any]]) -> Table:
    rows = [
        [
            str(run["workers"]),
            str(run["parts"]),
            f"{run['seconds']:.1f}",
            f"{run['predicted']:.1f}",
            f"{run['ratio']:.2f}",
            ", ".join(f"{busy:.1f}" for busy in run["processor_seconds"]),
        ]
        for run in runs
    ]
    return Table(
        ["workers", "parts", "s", "predicted, s", "predicted by measured", "processor s of each"], rows
    )


def _batch(rows: list[dict[str, Any]]) -> Table:
    head = ["workers", "parts go to", "hours until one is lost", "minutes", "worker hours", "lost"]
    return Table(
        head,
        [
            [
                str(row["workers"]),
                "ranks" if row["split"] == "static" else "whoever is free",
                "never" if row["hours_between_losses"] is None else f"{row['hours_between_losses']:g}",
                MISSING if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
                MISSING if row["worker_hours"] is None else f"{row['worker_hours']:.2f}",
                str(row["lost"]),
            ]
            for row in rows
        ],
    )


def _fleet(rows: list[dict[str, Any]]) -> Table:
    head = ["engines", "requests a second", "median s", "p95 s", "mean batch", "busy"]
    return Table(
        head,
        [
            [
                str(row["engines"]),
                f"{row['requests_per_s']:.1f}",
                f"{row['median_s']:.3f}",
                f"{row['p95_s']:.3f}",
                f"{row['batch']:.2f}",
                f"{row['busy']:.0%}",
            ]
            for row in rows
        ],
    )
