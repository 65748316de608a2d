"""Charts as inline SVG that takes its colours from the page, so that it is dark where the page is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

from qdeploy.plots.pictures import paint_curves, paint_ranges
from qdeploy.quant.time_ranges import tensor_names

if TYPE_CHECKING:
    from torch import Tensor

# matplotlib knows no CSS: it draws in placeholder colours, which are then replaced by the page's variables.
_INK, _LINE = "#010203", "#010204"
_SERIES = tuple(f"#0102{number:02x}" for number in range(16, 24))
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"}
_VARIABLES |= {color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)}
_WIDTH, _HEIGHT = 4.6, 3.0  # inches; sized for a phone; two fit side by side on a wide screen
_LETTER, _ROW, _LABELLED = 0.062, 0.13, 64


def curves(series: Mapping[str, Mapping[float, float]], what: str, name: str) -> str:
    """Values by timestep, a curve for each label, time from left to right as in sampling.

    Args:
        series: values by timestep, by label.
        what: the values, with their unit.
        name: of the chart, for anchors in the page that are its own.
    """
    with _drawn(name) as (svg, _, axes):
        paint_curves(axes, series, what)
    return svg[0]


def layers(series: Mapping[str, Sequence[float]], name: str) -> str:
    """SQNR in dB of every layer in the order of execution, a curve for each label."""
    with _drawn(name) as (svg, _, axes):
        for label, values in series.items():
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=2, label=label)
        axes.set_xlabel("layer, in the order of execution", fontsize=9)
        axes.set_ylabel("SQNR of its output, dB", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return svg[0]


def heat_map(ranges: Mapping[str, Tensor], name: str) -> str:
    """Ranges of tensors by timestep, each relative to its largest, a row for each tensor."""
    names = tensor_names(ranges)
    every = -(-len(names) // _LABELLED)
    left = 0.2 + _LETTER * max(map(len, names))
    width, height = left + 4.6, _ROW * len(names) / every + 1.1
    with _drawn(name, width, height, left=left, right=0.8) as (svg, figure, axes):
        image = paint_ranges(axes, ranges, every)
        bar = figure.add_axes((1 - 0.65 / width, 0.5 / height, 0.12 / width, 1 - 0.65 / height))
        figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    return svg[0]


@contextmanager
def _drawn(
    name: str, width: float = _WIDTH, height: float = _HEIGHT, *, left: float = 0.6, right: float = 0.1
) -> Iterator[tuple[list[str], Any, Any]]:
    """A figure with a pair of axes to be drawn on; afterwards the list holds its SVG. Lengths in inches."""
    from cycler import cycler
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    look: Any = {
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _LINE, "grid.color": _LINE, "axes.prop_cycle": cycler(color=_SERIES),
        "axes.facecolor": "none", "figure.facecolor": "none", "legend.framealpha": 0.0, "legend.edgecolor": _LINE,
        "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6,
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False,
    }  # fmt: skip
    svg: list[str] = []
    with style.context("default"), rc_context(look):
        figure = Figure(figsize=(width, height))
        bottom, top = 0.5, 0.15
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        yield svg, figure, figure.add_axes(box)
        stream = StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=metadata)
    svg.append(_for_page(stream.getvalue(), name))


def _for_page(svg: str, name: str) -> str:
    """The element alone, in the page's colours and font, its anchors distinct from those of other charts."""
    svg = svg[svg.index("<svg") :]
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would reach the page
    svg = re.sub(r"font-family: [^;\"]*monospace", "font-family: ui-monospace, monospace", svg)
    svg = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*; ?", "", svg)
    svg = svg.replace("base64,\n", "base64,")
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
    svg = re.sub(r" id=\"([^\"]+)\"", lambda found: found[0] if found[1] in used else "", svg)
    for anchor in used:
        svg = re.sub(rf"(id=\"|href=\"#|url\(#){re.escape(anchor)}(?=[\")])", rf"\g<1>{name}-{anchor}", svg)
    svg = re.sub(
        r"<svg [^>]*viewBox=\"([^\"]+)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg, count=1
    )
    return svg.replace("xlink:href", "href").strip()
