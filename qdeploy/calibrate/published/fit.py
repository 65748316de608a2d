"""Match the layers of a published checkpoint to those of the model that it belongs to.

Codes are what the authors' code computes: ``clamp(floor(W / delta) + [alpha >= 0] + zero_point)``, and rounding to
nearest where nothing was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibrate.published.layouts import (
    InputGrid,
    PublishedAttention,
    PublishedLayer,
    PublishedNetwork,
    WeightGrid,
)
from qdeploy.model.compvis_paths import Place, diffusers_paths
from qdeploy.network.roles import Structure
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import InvalidInputError

FARTHEST = 0.05  # relative distance of weights from the model's, in the median over layers


@dataclass
class FittedLayer:
    """A published layer in the place that it has in the model.

    Attributes:
        weight: as the model shapes it.
        bias: None if it has none.
        weights: its grid, or those of its halves; none if it stays in float.
        inputs: grids of its input; none if that stays in float.
        split: channels of the halves.
        tokens_last: whether the published layer had its tokens on the last axis, as one-dimensional convolutions do.
    """

    weight: Tensor
    bias: Tensor | None
    weights: list[WeightGrid]
    inputs: list[InputGrid]
    split: tuple[int, ...] = ()
    tokens_last: bool = False


@dataclass
class Fitted:
    """A published network by the paths of the model.

    Attributes:
        layers: its weighted layers, in execution order.
        attentions: those whose operands are quantized.
        head_widths: features of one head of each of these.
        steps: sampling steps that have scales of their own.
    """

    layers: dict[str, FittedLayer]
    attentions: dict[str, PublishedAttention] = field(default_factory=dict)
    head_widths: dict[str, int] = field(default_factory=dict)
    steps: int = 1


def fit(network: PublishedNetwork, denoiser: nn.Module, structure: Structure, where: str) -> Fitted:
    """Find the model's layer for each published one, and the reverse.

    Args:
        network: what the file holds.
        denoiser: the model, in full precision.
        structure: its layers.
        where: the file, for messages.

    Raises:
        InvalidInputError: layers are missing or left over, shapes differ, or the weights are another network's.
    """
    modules = dict(denoiser.named_modules())
    places = diffusers_paths(network.layers, denoiser)
    found: dict[str, FittedLayer] = {}
    for name, layer in network.layers.items():
        for place in places.get(name, ()):
            module = modules.get(place.path)
            if module is not None and isinstance(getattr(module, "weight", None), Tensor):
                found[place.path] = _fitted(layer, place, module, name, where)
    known = {layer.path for layer in structure.layers}
    strangers = [
        name for name, layer in network.layers.items() if layer.weights and not _lands(places, name, known)
    ]
    if strangers:
        raise InvalidInputError(
            f"{where} has {len(strangers)} quantized layers that the model lacks, first {strangers[0]}: is it of "
            "another network?"
        )
    if missing := [layer.path for layer in structure.layers if layer.path not in found]:
        raise InvalidInputError(
            f"{where} lacks {len(missing)} of the model's {len(known)} layers, first {missing[0]}: is it of "
            "another network?"
        )
    _check_distance(found, modules, where)
    fitted = Fitted({layer.path: found[layer.path] for layer in structure.layers}, steps=network.steps)
    for path, each in fitted.layers.items():
        each.split = _split(each, structure[path].split, path, where)
    for name, attention in network.attentions.items():
        path = _attention_path(name, places, structure, where)
        attends: Any = modules[path]
        fitted.attentions[path], fitted.head_widths[path] = attention, attends.inner_dim // attends.heads
    return fitted


def _lands(places: Mapping[str, list[Place]], name: str, known: set[str]) -> bool:
    return any(place.path in known for place in places.get(name, ()))


def _fitted(layer: PublishedLayer, place: Place, module: nn.Module, name: str, where: str) -> FittedLayer:
    own = module.get_parameter("weight")
    given = layer.weight if place.rows is None else layer.weight[place.rows]
    if _bare(given.shape) != _bare(own.shape):
        raise InvalidInputError(
            f"{where} has a weight of shape {list(given.shape)} at {name}, and the model {list(own.shape)}: is it of "
            "another network?"
        )
    if not bool(given.isfinite().all()):
        raise InvalidInputError(f"{where} holds NaN or Inf in the weight of {name}")
    bias = layer.bias if layer.bias is None or place.rows is None else layer.bias[place.rows]
    grids = [
        _chosen(grid, place, len(layer.weight), given.ndim, own.ndim, name, where) for grid in layer.weights
    ]
    linear = isinstance(module, nn.Linear)
    return FittedLayer(
        given.reshape(own.shape).float(), bias, grids, layer.inputs, (), linear and given.ndim == 3
    )


def _chosen(
    grid: WeightGrid, place: Place, channels: int, ndim: int, wanted: int, name: str, where: str
) -> WeightGrid:
    if grid.delta.numel() not in (1, channels) or grid.zero_point.numel() not in (1, channels):
        raise InvalidInputError(
            f"{where} has {grid.delta.numel()} scales for the {channels} channels of {name}"
        )
    delta, zero_point = grid.delta.expand(channels), grid.zero_point.expand(channels)
    alpha = grid.alpha
    if alpha is not None and (alpha.ndim != ndim or len(alpha) != channels):
        raise InvalidInputError(
            f"{where} has roundings of shape {list(alpha.shape)} at {name}, which do not fit"
        )
    if place.rows is not None:
        delta, zero_point = delta[place.rows], zero_point[place.rows]
        alpha = None if alpha is None else alpha[place.rows]
    if alpha is not None and alpha.ndim > wanted:
        alpha = alpha.flatten(wanted - 1) if wanted > 1 else alpha
    return replace(grid, delta=delta, zero_point=zero_point, alpha=alpha)


def _bare(shape: torch.Size) -> tuple[int, ...]:
    """A shape without the single positions that kernels of one pixel have."""
    return tuple(shape[:2]) + tuple(size for size in shape[2:] if size != 1)


def _check_distance(found: Mapping[str, FittedLayer], modules: Mapping[str, nn.Module], where: str) -> None:
    """Refuse weights of another network of the same shape; those that a method has tuned are few and near."""
    distances = []
    for path, layer in found.items():
        own = modules[path].get_parameter("weight").detach().cpu().float()
        distances.append(float((layer.weight - own).norm() / own.norm().clamp(min=1e-30)))
    distance = float(torch.tensor(distances).median())
    if distance > FARTHEST:
        raise InvalidInputError(
            f"the weights in {where} are not this model's: half of its layers differ by {distance:.0%} and more"
        )


def _split(layer: FittedLayer, traced: tuple[int, ...], path: str, where: str) -> tuple[int, ...]:
    if len(layer.weights) < 2:
        return ()
    alphas = [grid.alpha for grid in layer.weights]
    split = traced if any(a is None for a in alphas) else tuple(a.shape[1] for a in alphas if a is not None)
    if len(split) != 2 or sum(split) != layer.weight.shape[1] or (traced and split != traced):
        raise InvalidInputError(
            f"{where} splits {path} at other channels than where the model concatenates: is it of another network?"
        )
    return split


def _attention_path(name: str, places: Mapping[str, list[Place]], structure: Structure, where: str) -> str:
    for layer in ("to_q", "qkv", "q"):
        for place in places.get(f"{name}.{layer}", ()):
            path = place.path.rpartition(".")[0]
            if path in structure.attentions:
                return path
    raise InvalidInputError(f"{where} quantizes an attention that the model lacks: {name}")


def codes_of(layer: FittedLayer, number_format: Format) -> list[Tensor]:
    """Codes of a layer's weight, part by part, as the authors' code computes them."""
    parts = list(layer.weight.split(layer.split, 1)) if layer.split else [layer.weight]
    codes = []
    for part, grid in zip(parts, layer.weights, strict=True):
        codes.append(_unclamped(part, grid).clamp(number_format.qmin, number_format.qmax))
    return codes


def _unclamped(weight: Tensor, grid: WeightGrid) -> Tensor:
    shape = (-1, *[1] * (weight.ndim - 1))
    steps, zero_point = weight / grid.delta.view(shape), grid.zero_point.view(shape)
    if grid.alpha is None:
        return steps.round() + zero_point
    return steps.floor() + (grid.alpha >= 0).float() + zero_point
