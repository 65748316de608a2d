"""Tables of what `benchmarks/pipeline.py` measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from qdeploy.engines.timing import quantile
from qdeploy.evaluate.intervals import of_mean
from qdeploy.system.tables import MISSING, Table

OURS = ("qdeploy W8A8, decoder too", "qdeploy W8A8")  # the first that took part is what others are divided by


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: speed and quality for each number of steps, where the time goes, and what a process costs."""
    parts = [f"{_speeds(found, steps)}\n\n{_breakdown(found, steps)}" for steps in _steps(found)]
    skipped = [f"- {name} is left out: {reason}." for name, reason in found["skipped"].items()]
    return "\n\n".join([*parts, _processes(found), "\n".join(skipped)]).rstrip() + "\n"


def headline(found: Mapping[str, Any], steps: str = "20") -> str:
    """A Markdown table of few columns for the README: cost and quality of every pipeline."""
    ours = next(name for name in OURS if name in found["rows"])
    rows = [
        [*_cost(found, name, steps, ours), *_quality(row["steps"][steps]), f"{row['folder_mb']:.0f}"]
        for name, row in _by_cost(found, steps)
    ]
    head = ["whole pipeline", "CPU s an image", "times the first", "PSNR dB", "SQNR dB", "MB on disk"]
    return Table(head, rows).markdown()


def _steps(found: Mapping[str, Any]) -> list[str]:
    return sorted({steps for row in found["rows"].values() for steps in row["steps"]}, key=int)


def _by_cost(found: Mapping[str, Any], steps: str) -> list[tuple[str, Any]]:
    """The pipelines, the one of least processor time first."""
    return sorted(found["rows"].items(), key=lambda item: mean(item[1]["steps"][steps]["cpu_s"]))


def _cost(found: Mapping[str, Any], name: str, steps: str, ours: str | None) -> list[str]:
    """A pipeline's name, its processor time, and how many times ours that is."""
    took = {each: found["rows"][each]["steps"][steps]["cpu_s"] for each in (name, ours) if each}
    ratio = MISSING if ours is None or name == ours else _ratio(took[name], took[ours])
    return [name, _with_interval(took[name]), ratio]


def _quality(each: Mapping[str, Any]) -> list[str]:
    return [f"{each[key]:.1f}" if key in each else MISSING for key in ("psnr_db", "sqnr_db")]


def _speeds(found: Mapping[str, Any], steps: str) -> str:
    ours = next((name for name in OURS if name in found["rows"]), None)
    rows = []
    for name, row in _by_cost(found, steps):
        each = row["steps"][steps]
        clock = (_seconds(median(each["s"])), _seconds(quantile(each["s"], 0.95)))
        rows.append([*_cost(found, name, steps, ours), *clock, *_quality(each)])
    head = [
        "pipeline",
        "CPU s an image",
        f"times {ours or 'qdeploy'}",
        "s, p50",
        "s, p95",
        "PSNR dB",
        "SQNR dB",
    ]
    count = len(next(iter(found["rows"].values()))["steps"][steps]["s"])
    return f"## {steps} steps\n\n{count} images each; 95 % intervals.\n\n{Table(head, rows).markdown()}"


def _with_interval(values: Sequence[float]) -> str:
    ends = of_mean(values)
    digits = _digits(mean(values))
    shown = f"{mean(values):.{digits}f}"
    return shown if ends is None else f"{shown} ({max(ends[0], 0):.{digits}f} to {ends[1]:.{digits}f})"


def _digits(seconds: float) -> int:
    """Digits behind the point: three that count, and two at least."""
    return 2 if seconds >= 1 else 3 if seconds >= 0.1 else 4


def _seconds(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """How many times our processor time they take, from the rounds' own quotients (geometric mean)."""
    logs = [math.log(a / b) for a, b in zip(theirs, ours, strict=True)]
    ends = of_mean(logs)
    shown = f"{math.exp(mean(logs)):.2f}"
    return shown if ends is None else f"{shown} ({math.exp(ends[0]):.2f} to {math.exp(ends[1]):.2f})"


def _breakdown(found: Mapping[str, Any], steps: str) -> str:
    rows = []
    for name, row in found["rows"].items():
        each = row["steps"][steps]
        if not each["parts_ms"] or not each["parts_ms"][0]:
            continue
        seconds = [median(turn[part] for turn in each["parts_ms"]) / 1e3 for part in found["parts"]]
        rest = median(
            total - sum(turn.values()) / 1e3 for total, turn in zip(each["s"], each["parts_ms"], strict=True)
        )
        rows.append([name, *(f"{value:.3f}" for value in (*seconds, seconds[1] / int(steps), rest))])
    head = ["seconds by the clock, medians", *found["parts"], "one denoiser step", "the rest"]
    return Table(head, rows).markdown()


def _processes(found: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['folder_mb']:.0f}",
            f"{median(row['load_s']):.1f}",
            f"{median(row['first_s']):.1f}",
            f"{row['peak_mb']:.0f}",
        ]
        for name, row in found["rows"].items()
    ]
    head = ["pipeline", "MB on disk", "s to load", "s, first image", "peak MB"]
    return f"## What a process costs\n\n{Table(head, rows).markdown()}"
