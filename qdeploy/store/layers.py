"""``COMPONENT/layers.json`` of a checkpoint: its quantized layers, typed."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from qdeploy.store.bounded_json import read_json_object
from qdeploy.system.errors import InvalidInputError


class LayerEntry(Struct, frozen=True, kw_only=True):
    """A quantized layer.

    Attributes:
        path: its place in the network.
        reads: what names its input; layers that share one have the same.
        split: channels at which its input is split into parts with quantizers of their own.
        codes: shapes of its weight codes, one for each part.
        float_input: its input is not quantized.
        formats: of its weight and input, where they are others than the recipe's.
    """

    path: str
    reads: str
    split: tuple[int, ...]
    codes: tuple[tuple[int, ...], ...]
    float_input: bool = False
    formats: tuple[str, str] | None = None


class LayersFile(Struct, frozen=True, kw_only=True):
    """All of them.

    Attributes:
        layers: the quantized ones, in execution order.
        attentions: paths of attentions whose products are quantized.
        macs: multiplications of every layer, quantized or not, for one sample; None in files of old versions.
        products: those of attention's products.
    """

    layers: tuple[LayerEntry, ...]
    attentions: tuple[str, ...]
    macs: dict[str, int] | None = None
    products: dict[str, int] = {}


def read_layers(file: Path) -> LayersFile:
    """A checkpoint's description of its layers.

    Raises:
        InvalidInputError: something in it is missing or of another type.
    """
    try:
        return msgspec.convert(read_json_object(file), LayersFile, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"{file} is not as it should be: {error}") from error
