"""The thresholds of a check, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# An engine computes with the machine's floats, but not always in the same order as the simulation.
# ONNX Runtime and torch evaluate the graph as it is written; other engines fuse and reorder it.
ORACLE_DB, ENGINE_DB = 45.0, 40.0
ORACLES = ("onnxruntime", "torch")
# Where rounding flips bound parity (see `qdeploy.evaluate.parity`), the floor is their error less a margin: it
# varies from one pair to the next, for one row more than for all.
MEDIAN_MARGIN_DB, ROW_MARGIN_DB = 3.0, 6.0


@dataclass(frozen=True)
class Threshold:
    """A bound on a measured value.

    Attributes:
        name: the option's name.
        value: where the value is: keys from the top of the result.
        what: the value in words, with its unit.
        least: whether the bound is from below.
        default: the bound where none is set; None for no bound.
        needs: what it takes to measure the value.
    """

    name: str
    value: tuple[str, ...]
    what: str
    least: bool
    default: float | None
    needs: str


THRESHOLDS = (
    Threshold("min_parity", ("parity", "sqnr_db"), "parity in dB", True, None, "a probe"),
    Threshold(
        "min_sqnr",
        ("quality", "sqnr_db", "median"),
        "median SQNR of the prediction in dB",
        True,
        20.0,
        "a probe, or --reference",
    ),
    Threshold(
        "min_psnr", ("quality", "psnr_db"), "PSNR of images in dB", True, None, "--reference with a pipeline"
    ),
    Threshold(
        "max_fd_increase",
        ("quality", "fd_local", "increase"),
        "increase of FD-local",
        False,
        None,
        "--reference with a features/ folder, and two samples or more",
    ),
    Threshold(
        "min_speedup",
        ("speed", "ratio"),
        "speed compared with the 16-bit engine",
        True,
        None,
        "an engine with quantizers, and --reference",
    ),
)


def parity_floor(parity: Mapping[str, Any]) -> float:
    """The least median parity, in dB: an absolute one, or what rounding leaves of it."""
    absolute = ORACLE_DB if parity["backend"] in ORACLES else ENGINE_DB
    return round(min(absolute, float(parity["rounding_floor_db"]) - MEDIAN_MARGIN_DB), 2)


def rows_out_of_parity(parity: Mapping[str, Any]) -> Iterator[str]:
    """The rows of the probe that rounding does not explain, a sentence each, worst first."""
    absolute = ORACLE_DB if parity["backend"] in ORACLES else ENGINE_DB
    rows = zip(parity["by_row_db"], parity["floors_db"], parity["timesteps"], strict=True)
    short = [(min(absolute, floor) - ROW_MARGIN_DB - row, row, t) for row, floor, t in rows]
    for missing, row, t in sorted(short, reverse=True):
        if missing > 0:
            yield f"parity at timestep {t} is {row:.1f} dB, {missing:.1f} dB below what rounding explains"


def look_up(result: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    """The value at nested keys; None where one is missing."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)
