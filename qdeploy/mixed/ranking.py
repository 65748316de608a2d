"""Layers ranked by sensitivity, from both passes, and the agreement of the passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from qdeploy.mixed.options import ACTIVATIONS, WEIGHTS
from qdeploy.recipe.formats import NONE
from qdeploy.store.bounded_json import read_json_object
from qdeploy.system.errors import InvalidInputError

TOP = 10
Harm = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class LayerHarm:
    """How much a layer's quantization alone disturbs the prediction.

    Attributes:
        path: the layer.
        unit: the block that it belongs to.
        reads: path of the first layer that reads the same tensor.
        macs: multiply-accumulates per sample.
        count: weights.
        cheap: noise by signal of the prediction, mean over timesteps, by part and format: first order.
        exact: the same, measured; None where it was not measured.
    """

    path: str
    unit: str
    reads: str
    macs: int
    count: int
    cheap: Harm
    exact: Harm | None = None

    @property
    def best(self) -> Harm:
        """The exact harm, or else the estimate."""
        return self.cheap if self.exact is None else self.exact

    def to_json(self) -> dict[str, Any]:
        """The layer as JSON values."""
        measured = {} if self.exact is None else {"exact": _rounded(self.exact)}
        return {
            "path": self.path,
            "unit": self.unit,
            "reads": self.reads,
            "macs": self.macs,
            "weights": self.count,
            "harm": {"cheap": _rounded(self.cheap), **measured},
        }


class _Harms(Struct, frozen=True):
    cheap: dict[str, dict[str, float]]
    exact: dict[str, dict[str, float]] | None = None


class _Layer(Struct, frozen=True):
    path: str
    unit: str
    reads: str
    macs: int
    weights: int
    harm: _Harms


class SensitivityFile(Struct, frozen=True):
    """``sensitivity.json``.

    Attributes:
        layers: most sensitive first, as `LayerHarm.to_json` writes them.
        formats: of weights that were measured.
    """

    layers: list[_Layer]
    formats: list[str]

    def harms(self) -> list[LayerHarm]:
        """The layers, most sensitive first."""
        return [
            LayerHarm(
                layer.path,
                layer.unit,
                layer.reads,
                layer.macs,
                layer.weights,
                layer.harm.cheap,
                layer.harm.exact,
            )
            for layer in self.layers
        ]


def read_sensitivity_file(file: Path) -> SensitivityFile:
    """What `qdeploy sensitivity` wrote.

    Raises:
        InvalidInputError: it did not write that file, or something in it is missing or of another type.
    """
    try:
        return msgspec.convert(read_json_object(file), SensitivityFile, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"{file} is no ranking that `qdeploy sensitivity` wrote: {error}") from error


def _rounded(harm: Harm) -> dict[str, dict[str, float]]:
    """Nine significant digits: equal on every run, and more than the measurement's precision."""
    return {
        part: {name: float(f"{value:.9g}") for name, value in found.items()} for part, found in harm.items()
    }


def score(harm: Harm, weights: str, activations: str) -> float:
    """Harm of a layer with both parts quantized: errors of weight and input are independent, powers add."""
    return _of(harm[WEIGHTS], weights) + _of(harm[ACTIVATIONS], activations)


def _of(found: Mapping[str, float], name: str) -> float:
    """Harm of a format; for a layer of a checkpoint, which has one format only, harm of that one."""
    if name == NONE or not found:
        return 0.0
    return next(iter(found.values())) if len(found) == 1 else found[name]


def ranked(layers: Sequence[LayerHarm], weights: str, activations: str, exact: bool) -> list[str]:
    """Paths of layers, most sensitive first."""

    def harm(layer: LayerHarm) -> float:
        chosen = layer.exact if exact else layer.cheap
        assert chosen is not None
        return score(chosen, weights, activations)

    return [layer.path for layer in sorted(layers, key=lambda layer: (-harm(layer), layer.path))]


def agreement(exact: Sequence[str], cheap: Sequence[str]) -> dict[str, Any]:
    """The agreement of two rankings of the same layers.

    Returns:
        ``top``, how many first ones are compared; ``shared``, how many of those both have, and which; and
        ``spearman``, the correlation of ranks over all layers.
    """
    top = min(TOP, len(exact))
    shared = [path for path in exact[:top] if path in cheap[:top]]
    places = {path: place for place, path in enumerate(cheap)}
    squares = sum((place - places[path]) ** 2 for place, path in enumerate(exact))
    count = len(exact)
    spearman = 1 - 6 * squares / (count * (count**2 - 1)) if count > 1 else 1.0
    return {"top": top, "shared": len(shared), "layers": shared, "spearman": round(spearman, 4)}


def harm_db(harm: float) -> float:
    """Harm as the SQNR that the prediction would have with no other error, in dB."""
    return -10 * math.log10(harm) if harm > 0 else 200.0
