"""The results of `benchmarks.terrain` as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdeploy.system.tables import Table

_FIRST = "202 / 1096"


def tables(content: Mapping[str, Any]) -> str:
    """What presets reach, and why, as Markdown."""
    parts = [_presets(content["results"])]
    if "why" in content:
        parts += [_codes(content["why"]["codes"]), _noise(content["why"]["noise"])]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _both(found: Mapping[str, float] | None) -> str:
    return " / ".join(f"{found[timestep]:.1f}" for timestep in ("202", "1096")) if found else "-"


def _presets(records: list[dict[str, Any]]) -> str:
    head = [
        "preset", f"simulated: SQNR dB at t = {_FIRST}", "weights alone", "OpenVINO's engine", "MACs in int8",
        "CPU ms a call", "MB", "CPU s to calibrate", "CPU s to export",
    ]  # fmt: skip
    rows = []
    for record in records:
        built = "engine" in record
        preset, _, coverage = record["preset"].partition(" ")
        rows.append(
            [
                f"`{preset}`" + (f", `{coverage}`" if coverage else ""),
                _both(record["quantized"]),
                _both(record["weights alone"]),
                _both(record.get("engine")),
                f"{record['int8_mac_share']:.1%}" if built else "-",
                f"{record['engine_cpu_ms']:.0f}" if built else "-",
                f"{record['engine_mb']:.1f}" if built else "-",
                f"{record['cpu_seconds']:.0f}",
                f"{record['export_cpu_seconds']:.0f}" if built else "-",
            ]
        )
    return Table(head, rows).markdown()


def _codes(codes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    head = ["codes out of 256", "t", "the median tensor reaches", "the median channel", "channels below 16"]
    rows = [
        [f"`{name}`", timestep, f"{found['tensor']:.0f}", f"{found['channel']:.0f}", f"{found['few']:.0%}"]
        for name, times in codes.items()
        for timestep, found in times.items()
    ]
    return "## By timestep and channel\n\n" + Table(head, rows).markdown()


def _noise(noise: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["t", "all together, dB", "quantizers that make half of it", "the median one, dB", "the worst, dB"]
    rows = [
        [
            timestep,
            f"{found['all']:.1f}",
            f"{found['half_of_the_noise']} of {found['quantizers']}",
            f"{found['median']:.1f}",
            ", ".join(
                f"`{name}` {own:.1f}"
                for name, own in sorted(found["worst"].items(), key=lambda each: each[1])
            ),
        ]
        for timestep, found in noise.items()
    ]
    return (
        "## By layer: each activation quantizer of `w8a8-minmax-cpu` alone\n\n" + Table(head, rows).markdown()
    )
