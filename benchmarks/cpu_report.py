"""Tables and a picture of what `benchmarks/cpu.py` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdeploy.store.files import write_atomically, write_text
from qdeploy.system.tables import MISSING, Table, number

COLUMNS = [
    *("contender", "ms", "p10 to p90", "CPU ms", "vs fp32", "vs bf16", "SQNR dB", "worst", "int8 MACs"),
    *("MB", "peak MB", "load s"),
]
BASES = ("OpenVINO fp32", "OpenVINO bf16")


def write_report(found: dict[str, Any], place: Path) -> None:
    """Write ``table.md``, ``kernels.md`` and ``speed.png``, and print the tables.

    Args:
        found: what `measure` returned, with shape, batch and threads.
        place: a folder.
    """
    table = _speeds(found)
    kernels = _kernels(found)
    note = _note(found)
    left_out = "".join(f"- {name} is left out: {reason}\n" for name, reason in found["skipped"].items())
    write_text(place / "table.md", f"{Table(COLUMNS, table).markdown()}\n{note}\n\n{left_out}")
    if kernels[1]:
        write_text(place / "kernels.md", Table(*kernels).markdown())
    print(Table(COLUMNS, table).text())
    if kernels[1]:
        print(Table(*kernels).text())
    print(note)
    _picture(found, place / "speed.png")


def _speeds(found: dict[str, Any]) -> list[list[str]]:
    rows = found["rows"]
    cells = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["cpu_ms"]):
        kernels = row.get("kernels") or {}
        share = kernels.get("int8_mac_share")
        cells.append(
            [
                name,
                f"{row['ms']:.1f}",
                f"{row['ms_p10']:.1f} to {row['ms_p90']:.1f}",
                f"{row['cpu_ms']:.1f}",
                *(
                    f"{rows[base]['cpu_ms'] / row['cpu_ms']:.2f}x" if base in rows else MISSING
                    for base in BASES
                ),
                number(row["sqnr_db"], 1),
                number(row["sqnr_worst_db"], 1),
                MISSING if share is None else f"{share:.0%}",
                number(row["size_mb"], 1),
                number(row["peak_mb"], 0),
                f"{row['load_s']:.1f}",
            ]
        )
    return cells


def _kernels(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Kernel time by group; and the least that the machine's arithmetic allows for all products in int8."""
    told = {name: row["kernels"] for name, row in found["rows"].items() if row.get("kernels")}
    groups = sorted({group for kernels in told.values() for group in kernels["kernel_ms"]})
    columns = ["contender", "kernels", "ms in kernels", *groups, "int8 limit ms", "of the limit"]
    cells = []
    for name, kernels in told.items():
        times = kernels["kernel_ms"]
        total = sum(times.values())
        limit = _limit(found)
        cells.append(
            [
                name,
                str(kernels["kernels"]),
                f"{total:.1f}",
                *(f"{times[group]:.1f}" if group in times else MISSING for group in groups),
                f"{limit:.1f}",
                f"{limit / total:.0%}",
            ]
        )
    return columns, cells


def _limit(found: dict[str, Any]) -> float:
    """Milliseconds that the products of a call take at the speed of the best convolution measured, in int8."""
    # what is counted for an engine of ours is one sample, for the others the whole batch
    operations = 2 * max(row["kernels"]["macs"] for row in found["rows"].values() if row.get("kernels"))
    return float(operations / found["limits"]["int8_gops"] / 1e6)


def _note(found: dict[str, Any]) -> str:
    limits = found["limits"]
    halves = f"{limits['bf16_gops']:.0f} in bf16, " if "bf16_gops" in limits else ""
    return (
        f"{found['shape']}, batch {found['batch']}, {found['threads']} threads. Measured in this run: "
        f"{limits['int8_gops']:.0f} GOP/s in int8, {halves}"
        f"{limits['f32_gops']:.0f} in f32, {limits['copy_gb_per_s']:.1f} GB/s of copying. Quotients are of the "
        "processor's time, which other work on the machine disturbs less than the clock's."
    )


def _picture(found: dict[str, Any], path: Path) -> None:
    """Latency of every contender as a bar, with the spread of its calls and its error."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    rows = sorted(found["rows"].items(), key=lambda item: -item[1]["ms"])
    with rc_context(), style.context("default"):
        figure = Figure(figsize=(9, 0.35 * len(rows) + 1), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, row) in enumerate(rows):
            color = "tab:red" if name.startswith("qdeploy") else "tab:gray"
            spread = [[row["ms"] - row["ms_p10"]], [row["ms_p90"] - row["ms"]]]
            axes.barh(place, row["ms"], color=color, xerr=spread, error_kw={"elinewidth": 1, "alpha": 0.5})
            label = f" {row['ms']:.0f} ms, {row['sqnr_db']:.0f} dB"
            axes.text(row["ms_p90"], place, label, va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axes.set_xlim(0, 1.25 * max(row["ms_p90"] for _, row in rows))
        axes.set_xlabel(
            f"ms per call: {found['shape']}, batch {found['batch']}, {found['threads']} threads; SQNR against fp32"
        )
        write_atomically(path, lambda target: figure.savefig(target, format="png", dpi=100))
