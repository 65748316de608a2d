"""The two layouts in which quantized networks are published, read into one form.

``qdiffusion`` (Q-Diffusion, BRECQ, QuEST, QNCD): one ``state_dict``. A weighted layer has

    PATH.weight, PATH.bias                           floats
    PATH.weight_quantizer.{delta,zero_point,alpha}   one per output channel; ``alpha`` like the weight
    PATH.weight_quantizer_0.*                        of the second half of a split shortcut
    PATH.act_quantizer.{delta,zero_point}            and ``act_quantizer_0`` likewise
    ATTENTION.act_quantizer_{q,k,v,w}.*              operands of attention; w is the softmax output

QuEST has ``delta_list`` and ``zero_point_list`` with an entry for each kept timestep, the noisiest first.

``tfmq`` (TFMQ-DM, DGQ): ``{"weight": state_dict, "act_0": {...}, ...}``. The words are ``w``, ``b``, ``wqtizer``,
``wqtizer1``, ``aqtizer``, ``aqtizer1`` and ``aqtizer_{q,k,v,w}``; ``act_i`` holds the activations' scales of sampling
step i. Names begin with ``model.`` in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.model.tensor_files import load_tensors
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.suggest import unknown

OPERANDS = {"q": "query", "k": "key", "v": "value", "w": "probabilities"}
PLAIN_WEIGHT, PLAIN_BIAS = "weight", "bias"  # of layers that a method's code leaves as torch has them
FIRST_OF_TIME = ("temb.dense.0", "time_embed.0", "time_embedding.linear_1")
_PREFIXES = ("model.diffusion_model.", "model.")


@dataclass(frozen=True)
class Layout:
    """The words of a layout; of pairs the second is that of a split shortcut's second half.

    Attributes:
        weights: quantizers of weights.
        inputs: quantizers of activations.
        weight: the weight of a quantized layer.
        bias: its bias.
        by_step: scales of activations are tables, one for each sampling step.
        float_time: the first layer of the time path has roundings that are never used.
    """

    weights: tuple[str, str]
    inputs: tuple[str, str]
    weight: str
    bias: str
    by_step: bool = False
    float_time: bool = False


_QDIFFUSION = Layout(
    ("weight_quantizer", "weight_quantizer_0"), ("act_quantizer", "act_quantizer_0"), "weight", "bias"
)
_TFMQ = Layout(("wqtizer", "wqtizer1"), ("aqtizer", "aqtizer1"), "w", "b", by_step=True, float_time=True)
LAYOUTS = {
    "qdiffusion": _QDIFFUSION,
    "brecq": _QDIFFUSION,
    "quest": _QDIFFUSION,
    "tfmq": _TFMQ,
    "dgq": replace(_TFMQ, float_time=False),
}


@dataclass
class WeightGrid:
    """The grid of a weight or of one half of it: ``delta`` and ``zero_point`` [O]; ``alpha`` like the weight."""

    delta: Tensor
    zero_point: Tensor
    alpha: Tensor | None = None


@dataclass
class InputGrid:
    """The grid of an activation: ``delta`` and ``zero_point`` [K, ...], K sampling steps or 1."""

    delta: Tensor
    zero_point: Tensor


@dataclass
class PublishedLayer:
    """A weighted layer as its file has it; two grids where a shortcut is split."""

    weight: Tensor
    bias: Tensor | None = None
    weights: list[WeightGrid] = field(default_factory=list)
    inputs: list[InputGrid] = field(default_factory=list)


@dataclass
class PublishedAttention:
    """Operands of an attention by the names of `qdeploy.quant.attention.AttentionQuantizers`.

    Attributes:
        operands: their grids.
        scaled: whether q and k were multiplied by d^(-1/4) each before they were quantized.
    """

    operands: dict[str, InputGrid] = field(default_factory=dict)
    scaled: bool = False


@dataclass
class PublishedNetwork:
    """What a file holds, by paths of the network that it was made of.

    Attributes:
        layers: weighted layers, quantized or not.
        attentions: attentions whose operands are quantized.
        steps: sampling steps that have scales of their own; 1 for all alike.
    """

    layers: dict[str, PublishedLayer]
    attentions: dict[str, PublishedAttention]
    steps: int


def find_layout(method: str) -> Layout:
    """The layout that a method's code writes.

    Raises:
        UsageError: there is none for this method.
    """
    if method not in LAYOUTS:
        raise UsageError(unknown("method", method, LAYOUTS))
    return LAYOUTS[method]


def read_published(path: Path, method: str) -> PublishedNetwork:
    """Read a published checkpoint, as tensors only.

    Args:
        path: the file.
        method: whose code wrote it: one of `LAYOUTS`.

    Raises:
        InvalidInputError: it holds more than tensors, is not in this layout, or has NaN or Inf among its scales.
    """
    layout, content = find_layout(method), load_tensors(path)
    where = str(path)
    state, steps = _parts(content, layout, where)
    network = PublishedNetwork({}, {}, max(1, len(steps)))
    entries = {_stripped(name): tensor for name, tensor in state.items()}
    for name, tensor in entries.items():
        owner, _, word = name.rpartition(".")
        if word in (layout.weight, PLAIN_WEIGHT) and tensor.ndim > 1:
            bias = entries.get(f"{owner}.{layout.bias}", entries.get(f"{owner}.{PLAIN_BIAS}"))
            network.layers[owner] = PublishedLayer(tensor, bias)
    for owner, layer in network.layers.items():
        layer.weights = _weight_grids(entries, owner, layout, where)
    if layout.by_step:
        _leave_out_ends(network, layout)
    tables = [{_stripped(name): tensor for name, tensor in step.items()} for step in steps] or [entries]
    _read_inputs(network, tables, layout, where)
    if not any(layer.weights for layer in network.layers.values()):
        raise InvalidInputError(
            f"{path} holds no quantized weights as {method} writes them ({layout.weights[0]}.delta): is it of "
            "another method?"
        )
    return network


def _leave_out_ends(network: PublishedNetwork, layout: Layout) -> None:
    """Take back the grids of layers that are saved and never used.

    TFMQ-DM's and DGQ's code finds scales for the layers at both ends, then switches their quantization off, when it
    calibrates and when it loads (``disable_out_quantization``): they are without roundings where others have some.
    TFMQ-DM's switches off the first layer of the time path with them, although its roundings are learned.
    """
    learned = {
        name: any(grid.alpha is not None for grid in each.weights) for name, each in network.layers.items()
    }
    unused = [name for name, layer in network.layers.items() if layer.weights and not learned[name]]
    if any(learned.values()) and unused:
        if layout.float_time:
            unused += [name for name in FIRST_OF_TIME if name in network.layers]
        for name in unused:
            network.layers[name].weights.clear()


def _parts(
    content: Any, layout: Layout, where: str
) -> tuple[Mapping[str, Tensor], list[Mapping[str, Tensor]]]:
    """The weights' ``state_dict`` and the tables of sampling steps, in their order."""
    if not isinstance(content, Mapping):
        raise InvalidInputError(
            f"{where} holds a {type(content).__name__} instead of a dictionary of tensors"
        )
    state: Any = content
    steps: list[Any] = []
    if layout.by_step:
        if "weight" not in content:
            raise InvalidInputError(
                f"{where} lacks 'weight': scales of activations alone are no network; merge them with their weights"
            )
        state = content["weight"]
        count = sum(str(name).startswith("act_") for name in content)
        for number in range(count):
            if f"act_{number}" not in content:
                raise InvalidInputError(f"{where} has {count} tables of activations but lacks 'act_{number}'")
            steps.append(content[f"act_{number}"])
    elif isinstance(content.get("state_dict"), Mapping):
        state = content["state_dict"]
    for part in (state, *steps):
        if not isinstance(part, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in part.items()
        ):
            raise InvalidInputError(f"{where} is in another layout: it holds more than tensors by name")
    return state, steps


def _stripped(name: str) -> str:
    prefix = next((each for each in _PREFIXES if name.startswith(each)), "")
    return name[len(prefix) :]


def _weight_grids(entries: Mapping[str, Tensor], owner: str, layout: Layout, where: str) -> list[WeightGrid]:
    grids = []
    for word in layout.weights:
        found = [entries.get(f"{owner}.{word}.{part}") for part in ("delta", "zero_point", "alpha")]
        delta, zero_point, alpha = found
        if delta is None and zero_point is None and alpha is None:
            break
        if delta is None or zero_point is None:
            raise InvalidInputError(f"{where} lacks the scales of {owner}.{word}")
        name = f"{owner}.{word}"
        check_scales(delta, zero_point, name, where)
        if alpha is not None and not bool(alpha.isfinite().all()):
            raise InvalidInputError(f"{where} holds NaN or Inf in {name}.alpha")
        grids.append(WeightGrid(delta.float().flatten(), zero_point.float().flatten(), alpha))
    return grids


def _read_inputs(
    network: PublishedNetwork, tables: list[dict[str, Tensor]], layout: Layout, where: str
) -> None:
    for name in tables[0]:
        owner, _, part = name.rpartition(".")
        path, _, word = owner.rpartition(".")
        if part not in ("delta", "delta_list"):
            continue
        operand = OPERANDS.get(word.removeprefix(f"{layout.inputs[0]}_"), "")
        if word in layout.inputs and path in network.layers:
            grids = network.layers[path].inputs
            if len(grids) != layout.inputs.index(word):
                raise InvalidInputError(f"{where} has {owner} without its first half")
            grids.append(_input_grid(tables, owner, part, where))
        elif operand:
            scaled = path.endswith((".qkv_matmul", ".smv_matmul"))
            whose = path.removesuffix(".qkv_matmul").removesuffix(".smv_matmul").removesuffix(".attention")
            attention = network.attentions.setdefault(whose if scaled else path, PublishedAttention())
            attention.scaled |= scaled
            attention.operands[operand] = _input_grid(tables, owner, part, where)
        # what remains are quantizers of whole blocks, which no code ever calls
    listed = {len(grid.delta) for layer in network.layers.values() for grid in layer.inputs}
    listed |= {len(grid.delta) for each in network.attentions.values() for grid in each.operands.values()}
    if len(listed - {1}) > 1:
        raise InvalidInputError(
            f"{where} has scales for {sorted(listed)} sampling steps: they do not fit together"
        )
    network.steps = max(listed, default=1)


def _input_grid(tables: list[dict[str, Tensor]], owner: str, part: str, where: str) -> InputGrid:
    other = part.replace("delta", "zero_point")
    found: list[tuple[Tensor, Tensor]] = []
    for number, table in enumerate(tables):
        delta, zero_point = table.get(f"{owner}.{part}"), table.get(f"{owner}.{other}")
        if delta is None:
            raise InvalidInputError(f"{where} lacks {owner}.{part} in the table of step {number}")
        zero_point = torch.zeros_like(delta) if zero_point is None else zero_point
        check_scales(delta, zero_point, owner, where)
        found.append((delta.float(), zero_point.float().expand_as(delta)))
    if part == "delta_list":
        return InputGrid(*found[0])
    if len({delta.shape for delta, _ in found}) > 1:
        raise InvalidInputError(
            f"{where} groups {owner} along other axes at some steps than at others, which no quantizer holds: "
            "import the weights alone with --activations none"
        )
    return InputGrid(torch.stack([d for d, _ in found]), torch.stack([z for _, z in found]))


def check_scales(delta: Tensor, zero_point: Tensor, name: str, where: str) -> None:
    """Refuse scales that are no scales.

    Raises:
        InvalidInputError: one is not positive, or NaN or Inf; or a zero point is no whole number.
    """
    if not (bool(delta.isfinite().all()) and bool(zero_point.isfinite().all())):
        raise InvalidInputError(f"{where} holds NaN or Inf in the scales of {name}")
    if not bool((delta > 0).all()):
        raise InvalidInputError(f"{where} holds a scale that is not positive in {name}")
    if not torch.equal(zero_point.float(), zero_point.float().round()):
        raise InvalidInputError(f"{where} holds a zero point that is no whole number in {name}")
