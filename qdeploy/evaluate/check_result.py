"""The result of a check: measured values, compared with thresholds, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.evaluate.metrics.base import other_metrics
from qdeploy.evaluate.over_time import timestep_table
from qdeploy.evaluate.thresholds import THRESHOLDS, look_up, parity_floor, rows_out_of_parity
from qdeploy.store.artifact import Artifact, EngineFolder
from qdeploy.system.tables import Table, number


@dataclass(frozen=True)
class CheckResult:
    """What was measured, and what of it missed its threshold.

    Attributes:
        subject: the artifact that was checked.
        parity: the result of `qdeploy.evaluate.parity.measure_parity`.
        quality: the metrics' values, and ``source``: ``trajectory`` or ``probe``.
        thresholds: the bounds by name; None where there is no bound.
        failures: a sentence for each bound that is missed.
        before: what the subject was compared with, and its SQNR by timestep; None if nothing was named.
        pictures: the files that were drawn.
        speed: the ratio to the 16-bit engine, its quartiles and the baseline; None if it was not measured.
    """

    subject: Artifact
    parity: dict[str, Any]
    quality: dict[str, Any]
    thresholds: dict[str, float | None]
    failures: list[str]
    before: dict[str, Any] | None = None
    pictures: list[Path] = field(default_factory=list)
    speed: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether no threshold is missed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy check --json``."""
        return {
            "path": str(self.subject.path),
            "kind": self.subject.kind,
            "sha256": self.subject.sha256,
            "passed": self.passed,
            "failures": self.failures,
            "parity": self.parity,
            "quality": self.quality,
            "thresholds": self.thresholds,
            "before": self.before,
            **({} if self.speed is None else {"speed": self.speed}),
            "pictures": [str(picture) for picture in self.pictures],
        }

    def table(self) -> str:
        """The result for people."""
        parity, quality = self.parity, self.quality
        rows = [
            (f"parity with the {parity['expected']} probe, dB, median row", number(parity["sqnr_db"])),
            ("  rows that agree to all digits", f"{parity['same_rows']:.0%}"),
            ("  rounding floor, dB", number(parity["rounding_floor_db"])),
            *((f"  {pair}, dB", number(value["sqnr_db"])) for pair, value in parity["pairs"].items()),
            (f"SQNR, dB, median over timesteps ({quality['source']})", number(quality["sqnr_db"]["median"])),
            ("  worst timestep", number(quality["sqnr_db"]["worst"])),
        ]
        if "psnr_db" in quality:
            rows.append(("PSNR of images on the same seeds, dB", number(quality["psnr_db"])))
        if "drift" in quality:
            rows.append(("drift of the trajectory at its end", number(quality["drift"]["final"], 4)))
        if "fd_local" in quality:
            fd = quality["fd_local"]
            rows.append((f"FD-local, {fd['count']} images", number(fd["subject"], 3)))
            rows.append(("  of the reference", number(fd["reference"], 3)))
        rows += [(name, _shown(quality[name])) for name in other_metrics() if name in quality]
        if self.speed is not None:
            low, high = self.speed["quartiles"]
            ratio = f"{self.speed['ratio']:.2f}x, half of all rounds from {low:.2f}x to {high:.2f}x"
            rows.append((f"speed compared with {self.speed['baseline']}", ratio))
        bounds = {name: value for name, value in self.thresholds.items() if value is not None}
        rows += [(f"threshold {name.replace('_', '-')}", number(value)) for name, value in bounds.items()]
        verdict = "passed" if self.passed else "\n".join(f"failed: {failure}" for failure in self.failures)
        if quality["source"] == "probe":
            verdict += "\nimages were not compared: name the full-precision model with --reference"
        if self.speed is None and isinstance(self.subject, EngineFolder):
            verdict += "\nspeed was not compared with 16 bits: --min-speedup 1 does"
        parts = [Table([str(self.subject.path), ""], rows).text()]
        if self.before is not None:
            parts.append(timestep_table(self.before["sqnr_db"], quality["sqnr_db"]))
        if self.pictures:
            parts.append(f"pictures: {', '.join(map(str, self.pictures))}")
        return "\n".join([*parts, verdict])


def _shown(value: Any) -> str:
    """The result of another package's metric in a cell: the number, or what it calls its value or its mean."""
    if isinstance(value, Mapping):
        value = value.get("value", value.get("mean"))
    if isinstance(value, str):
        return value
    return number(value, 4) if isinstance(value, int | float) else "in --json"


def judge(
    artifact: Artifact,
    parity: dict[str, Any],
    quality: dict[str, Any],
    given: Mapping[str, float | None],
    speed: dict[str, Any] | None = None,
) -> CheckResult:
    """Hold what was measured against the thresholds."""
    result = {"parity": parity, "quality": quality, "speed": speed}
    bounds: dict[str, float | None] = {}
    failures: list[str] = []
    for threshold in THRESHOLDS:
        bound = threshold.default if given[threshold.name] is None else given[threshold.name]
        if bound is None and threshold.name == "min_parity":
            bound = parity_floor(parity)
            failures += list(rows_out_of_parity(parity))[:1]
        bounds[threshold.name] = bound
        value = look_up(result, threshold.value)
        if bound is None:
            continue
        if value is None:
            failures.append(f"the {threshold.what} was not measured: it takes {threshold.needs}")
            continue
        # The comparison is written so that a NaN fails.
        if not (value >= bound if threshold.least else value <= bound):
            side = "below" if threshold.least else "above"
            failures.append(f"the {threshold.what} is {value:.2f}, {side} {bound:.2f}")
    return CheckResult(artifact, parity, quality, bounds, failures, speed=speed)
