"""One table of engines: size, speed, quality and parity side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.evaluate.baselines import FULL, HALF
from qdeploy.evaluate.ratios import in_words
from qdeploy.store.artifact import EngineFolder
from qdeploy.system.tables import Cell, Table, amount, number, percentage


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo run.

    Attributes:
        path: the output folder.
        engines: the table, a row for each engine.
        stages: seconds of each stage.
        checks: what `qdeploy.check` measured, by engine.
        benchmark: what `qdeploy.benchmark` measured.
        notes: lines below the table.
    """

    path: Path
    engines: Table
    stages: dict[str, float]
    checks: dict[str, dict[str, Any]]
    benchmark: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check["passed"] for check in self.checks.values())

    @property
    def table(self) -> str:
        """The result for the terminal."""
        return "\n".join([self.engines.text(), *self.notes])

    def markdown(self) -> str:
        """The result in Markdown."""
        return "\n".join([self.engines.markdown(), *(f"{note}  " for note in self.notes)]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy demo --json``."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "seconds": round(sum(self.stages.values()), 1),
            "stages": self.stages,
            "checks": self.checks,
            "benchmark": self.benchmark,
        }


def engine_table(
    engines: Mapping[str, EngineFolder],
    titles: Mapping[str, str],
    checks: Mapping[str, Mapping[str, Any]],
    speed: Mapping[str, Any],
    batch: int,
) -> Table:
    """A table with one row for each engine.

    Args:
        engines: by name; ``f32`` and ``bf16`` are the baselines.
        titles: of the rows.
        checks: JSON objects of `qdeploy.check` by name; the full-precision engine has none.
        speed: the JSON object of `qdeploy.benchmark`, measured at several batch sizes.
        batch: the batch size whose speed is shown.
    """
    results = {
        name: result
        for result in speed["results"]
        if result["batch"] == batch
        for name, engine in engines.items()
        if result["sha256"] == engine.sha256
    }
    reference = next((check["quality"].get("fd_local") for check in checks.values()), None)
    columns = [
        "engine",
        "MB",
        f"ms per step, {batch} images",
        "vs f32",
        "vs bf16",
        "SQNR dB, median",
        "worst",
        "PSNR dB",
        "FD-local" if reference is None else f"FD-local, {reference['count']} images",
        "int8 MACs",
        "parity dB",
    ]
    rows: list[list[Cell | str]] = []
    for name in engines:
        result, check = results[name], checks.get(name)
        quality = check["quality"] if check else {}
        sqnr = quality.get("sqnr_db", {})
        fd = quality.get("fd_local", {}).get("subject")
        if check is None and reference:
            fd = reference["reference"]
        pairs = [f"{result['name']} vs {kind}, batch {batch}" for kind in (FULL, HALF)]
        rows.append(
            [
                titles[name],
                number(result["size_mb"], 1),
                number(result["ms"]["median"]),
                *(_ratio_cell(speed, pair) for pair in pairs),
                number(sqnr.get("median"), 1),
                number(sqnr.get("worst"), 1),
                number(quality.get("psnr_db"), 1),
                number(fd),
                percentage(result["int8_mac_share"]),
                number(check["parity"]["sqnr_db"] if check else None, 1),
            ]
        )
    return Table(columns, rows)


def _ratio_cell(speed: Mapping[str, Any], pair: str) -> Cell:
    ratio = speed["ratios"].get(pair)
    spread = speed.get("ratios_quartiles", {}).get(pair)
    return amount(None) if ratio is None else Cell(in_words(ratio, spread), ratio)


def summary_notes(checks: Mapping[str, Mapping[str, Any]], speed: Mapping[str, Any]) -> list[str]:
    """Notes on how the numbers of the table were measured."""
    where, some = speed["machine"], next(iter(checks.values()))["quality"]
    threads = speed["threads"] or "all"
    notes = [
        f"speed: {where['cpu']}, {where['cores']} cores, threads: {threads}, medians of interleaved rounds",
        f"quality: {some['samples']} images of fresh seeds, {some['inference_steps']} steps, against full "
        "precision; FD-local is no FID",
    ]
    for name, check in checks.items():
        verdict = "passed" if check["passed"] else "; ".join(check["failures"])
        notes.append(f"check {name}: {verdict}")
    return notes
