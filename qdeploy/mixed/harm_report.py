"""The report of a sensitivity analysis: harms of layers by format, and their ranking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from qdeploy.calibrate.session import Session
from qdeploy.mixed.options import ACTIVATIONS, WEIGHTS, LayerOptions
from qdeploy.mixed.ranking import LayerHarm, agreement, harm_db, ranked, score
from qdeploy.mixed.request import Work
from qdeploy.mixed.rows import TimestepRows
from qdeploy.recipe.formats import parse_format


def harms_of(
    session: Session, subjects: list[LayerOptions], cheap: list[Tensor], exact: list[Tensor] | None
) -> list[LayerHarm]:
    """The harm of every layer in every format, from the noise of the cheap pass and of the exact one.

    Args:
        session: whose layers were judged.
        subjects: the layers with their options.
        cheap: estimated relative noise of each, ``[options, timesteps]``.
        exact: measured relative noise of each, if it was measured.
    """
    layers = {layer.path: layer for layer in session.layers}
    found = []
    for number, subject in enumerate(subjects):
        layer = layers[subject.path]
        count = sum(part.numel() for part in subject.layer.weight_parts())
        harm = LayerHarm(
            layer.path, layer.unit, layer.reads, layer.macs, count, _by_format(subject, cheap[number])
        )
        found.append(replace(harm, exact=_by_format(subject, exact[number])) if exact else harm)
    return found


def _by_format(subject: LayerOptions, noise: Tensor) -> dict[str, dict[str, float]]:
    harm: dict[str, dict[str, float]] = {WEIGHTS: {}, ACTIVATIONS: {}}
    for option, row in zip(subject.options(), noise, strict=True):
        harm[option.part][option.format] = float(row.mean())
    return harm


def _in_short(layer: LayerHarm, formats: dict[str, str]) -> dict[str, Any]:
    """What a list of layers shows: the harm in the formats of the ranking, in dB; more is worse."""
    stored = parse_format(formats["weights"])
    harm = score(layer.best, **formats)
    bits = None if stored is None else stored.bits
    return {"name": layer.path, "bits": bits, "harm_db": round(-harm_db(harm), 2)}


def report_of(
    work: Work, rows: TimestepRows, probes: int, layers: list[LayerHarm], exact: bool
) -> dict[str, Any]:
    """The content of ``sensitivity.json``: layers by harm, and how it was measured.

    Args:
        work: the request.
        rows: calibration rows that were used.
        probes: backward passes of the cheap pass.
        layers: their harms.
        exact: whether the exact pass was made.
    """
    formats = {"weights": work.recipe.weights, "activations": work.recipe.activations}
    rankings = {"cheap": ranked(layers, **formats, exact=False)}
    if exact:
        rankings["exact"] = ranked(layers, **formats, exact=True)
    order = rankings.get("exact", rankings["cheap"])
    by_path = {layer.path: layer.to_json() | _in_short(layer, formats) for layer in layers}
    return {
        "harm_is": "power of the prediction's error by that of the prediction, one layer quantized alone, mean "
        "over timesteps",
        "ranked_by": formats,
        "formats": list(work.formats),
        "rows": len(rows.numbers),
        "timesteps": rows.timesteps.tolist(),
        "probes": probes,
        "ranking": order,
        "rankings": rankings,
        "layers": [by_path[path] for path in order],
        **({"agreement": agreement(rankings["exact"], rankings["cheap"])} if exact else {}),
    }
