"""Plots over timesteps: the range of every tensor as a heat map, and the error by timestep.

The horizontal axis is sampling time, from the highest timestep to the lowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.quant.time_ranges import spans, tensor_names
from qdeploy.store.files import explained_os_errors, write_atomically
from qdeploy.system.errors import InvalidInputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

ERROR_PICTURE = "error.png"
_DPI = 100
_ROW, _LEAST_ROW = 0.15, 0.04  # inches; rows become lower where there are more than _LABELLED
_LABELLED = 120
_LETTER = 0.062  # width of a letter of the labels in inches
_TICKS = 10


def picture_folder(path: str | Path) -> Path:
    """A folder to put pictures into, made if it is not there.

    Raises:
        UsageError: it is a file, or cannot be made.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the pictures")
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def relative_ranges(ranges: Mapping[str, Tensor]) -> Tensor:
    """[Q, T] the range of each tensor at each timestep as a share of its largest; 0 for a tensor of zeros."""
    magnitudes = spans(ranges)
    return magnitudes / magnitudes.amax(1, keepdim=True).clamp(min=1e-30)


def range_heat_map(ranges: Mapping[str, Tensor], path: Path) -> None:
    """Draw how ranges change over time, each relative to the tensor's own largest.

    Args:
        ranges: as in ``ranges.safetensors``.
        path: the PNG file. A row for each tensor, in the order of execution from top to bottom.

    Raises:
        InvalidInputError: there are no ranges in ``ranges``.
    """
    names = tensor_names(ranges)
    if not names or not len(ranges["timesteps"]):
        raise InvalidInputError(f"{path} cannot be drawn: no tensor's range over time is known")
    every = -(-len(names) // _LABELLED)
    left = 0.3 + _LETTER * max(map(len, names))
    width, height = left + 6.2, max(_LEAST_ROW, _ROW / every) * len(names) + 1.1
    with _drawn(path, width, height, left=left, bottom=0.55, right=1.2, top=0.4) as (figure, axes):
        image = paint_ranges(axes, ranges, every)
        axes.set_title("range over time, relative to each tensor's largest", fontsize=9, loc="left")
        bar = figure.add_axes((1 - 1.05 / width, 0.55 / height, 0.15 / width, 1 - 0.95 / height))
        figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)


def paint_ranges(axes: Any, ranges: Mapping[str, Tensor], every: int) -> Any:
    """The heat map alone, on axes; a name at every so many rows. Returns matplotlib's image."""
    names, shares = tensor_names(ranges), relative_ranges(ranges).flip(1)
    timesteps = [f"{t:.4g}" for t in ranges["timesteps"].flip(0).tolist()]
    image = axes.imshow(shares.numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    shown = range(0, len(names), every)
    axes.set_yticks(shown, [names[row] for row in shown], fontsize=7, family="monospace")
    columns = range(0, len(timesteps), -(-len(timesteps) // _TICKS))
    axes.set_xticks(columns, [timesteps[column] for column in columns], fontsize=8)
    axes.set_xlabel("timestep", fontsize=9)
    return image


def error_by_timestep(series: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Draw the signal-to-noise ratio of predictions by timestep.

    Args:
        series: dB by timestep, by label; each is a curve.
        path: the PNG file.
    """
    with _drawn(path, 7.5, 4.2, left=0.7, bottom=0.55, right=0.2, top=0.4) as (_, axes):
        paint_curves(axes, series, "SQNR, dB")
        axes.set_title("error by timestep: higher is better", fontsize=9, loc="left")


def paint_curves(axes: Any, series: Mapping[str, Mapping[float, float]], what: str) -> None:
    """Curves over timesteps on axes, with a legend.

    Args:
        axes: matplotlib's.
        series: values by timestep, by label.
        what: the values, with their unit.
    """
    for label, values in series.items():
        timesteps = sorted(values, reverse=True)
        axes.plot(timesteps, [values[t] for t in timesteps], marker="o", markersize=3, label=label)
    axes.invert_xaxis()
    axes.set_xlabel("timestep", fontsize=9)
    axes.set_ylabel(what, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


@contextmanager
def _drawn(
    path: Path, width: float, height: float, *, left: float, bottom: float, right: float, top: float
) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes, to be drawn on and then written; all lengths in inches.

    A user's own settings of matplotlib do not affect it.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure  # without pyplot: no window and no global state

    with style.context("default"), rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), dpi=_DPI)
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        yield figure, figure.add_axes(box)
        write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=_DPI))
