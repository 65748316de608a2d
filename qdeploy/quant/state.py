"""The state of quantizers as named tensors: what a step of the journal and a checkpoint hold.

Names: ``PATH.weight.PART.{scale,zero_point,codes}`` and ``PATH.input.PART.{scale,zero_point}`` for a layer,
``PATH.attention.{query,key,value,probabilities}.{scale,zero_point}`` for an attention module,
``PATH.feature.{rows,edges,scale,zero_point}`` for a table of temporal features; ``PATH.smoothing``,
``PATH.rotation``, ``PATH.branch_down`` and ``PATH.branch_up`` for what stands in front of a layer's quantizer and
beside it, ``PATH.split`` and ``PATH.order`` where a stage has cut its channels, ``PATH.tuned`` and
``PATH.tuned_bias`` while a tuned weight is not yet baked. PART counts the parts of a split layer from 0.
Codes of less than 8 bits are packed without gaps. A quantizer with a scale for each group of timesteps has
``edges`` too, and one with scales along an axis ``axis``; one of an im2col matrix has ``patches``; softmax
outputs on a logarithmic scale have ``PATH.attention.probabilities.log2``: bits, and whether a start token
bypasses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qdeploy.network.current_timestep import CurrentTimestep, current_timestep_of
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.feature_table import FeatureTable
from qdeploy.quant.layer import OF_LAYERS, QuantizedLayer
from qdeploy.quant.log_attention import LogQuantizer
from qdeploy.quant.operators import code_type
from qdeploy.quant.patches import PatchQuantizer
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.quant.shared_inputs import by_quantizer
from qdeploy.system.errors import InvalidInputError

Quantizer = ActivationQuantizer | WeightQuantizer


def quantizers(denoiser: nn.Module, prefix: str = "") -> Iterator[tuple[str, Quantizer]]:
    """The quantizers at and below ``prefix``, by the names above; shared ones under their first name."""
    seen: set[int] = set()
    for path, module in denoiser.get_submodule(prefix).named_modules(prefix=prefix):
        for name, quantizer in _own(path, module):
            if id(quantizer) not in seen:
                seen.add(id(quantizer))
                yield name, quantizer


def _own(path: str, module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    if isinstance(module, QuantizedLayer):
        for kind, owned in (("weight", module.weight_quantizers), ("input", module.input_quantizers)):
            for part, quantizer in enumerate(owned):
                assert isinstance(quantizer, Quantizer)
                yield f"{path}.{kind}.{part}", quantizer
    elif isinstance(module, AttentionQuantizers):
        for name, quantizer in module.named_children():
            if isinstance(quantizer, ActivationQuantizer):
                yield f"{path.removesuffix('_quantizers')}.{name}", quantizer


def read_state(denoiser: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state of all quantizers at and below ``prefix``."""
    state: dict[str, Tensor] = {}
    for name, quantizer in quantizers(denoiser, prefix):
        state[f"{name}.scale"] = quantizer.scale.detach().cpu().clone()
        state[f"{name}.zero_point"] = _stored_zero_point(quantizer)
        if isinstance(quantizer, ActivationQuantizer) and quantizer.banked:
            state[f"{name}.edges"] = quantizer.edges.cpu().clone()
        if isinstance(quantizer, ActivationQuantizer) and quantizer.axis is not None:
            state[f"{name}.axis"] = torch.tensor(quantizer.axis)
        if isinstance(quantizer, PatchQuantizer):
            state[f"{name}.patches"] = torch.tensor(True)
        if isinstance(quantizer, WeightQuantizer) and quantizer.held is not None:
            state[f"{name}.codes"] = quantizer.stored_codes().detach().cpu()
    for path, attention in _attentions(denoiser, prefix):
        if isinstance(attention.probabilities, LogQuantizer):
            settings = (attention.probabilities.bits, int(attention.probabilities.start))
            state[f"{path}.probabilities.log2"] = torch.tensor(settings)
    for path, layer in _layers(denoiser, prefix):
        for name in OF_LAYERS:
            value = getattr(layer, name)
            if value is not None:
                state[f"{path}.{name}"] = value.detach().cpu().clone()
        if layer.order is not None:
            state[f"{path}.split"] = torch.tensor(layer.split)
        if layer.table is not None:
            tables = layer.table.named_buffers()
            state |= {f"{path}.feature.{name}": buffer.cpu().clone() for name, buffer in tables}
    return state


def _stored_zero_point(quantizer: Quantizer) -> Tensor:
    """Zero points in the type of the codes, or in 16 bits: those of weights that do not reach zero may be no code."""
    zero_point = quantizer.zero_point.cpu()
    stored = zero_point.to(code_type(quantizer.format))
    return stored if torch.equal(stored.to(zero_point.dtype), zero_point) else zero_point.to(torch.int16)


def write_state(
    denoiser: nn.Module, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> None:
    """Set all quantizers at and below ``prefix`` from what `read_state` gave.

    Args:
        denoiser: the network.
        state: named tensors.
        shapes: shape of the codes of each weight quantizer, by name.
        prefix: where to begin.

    Raises:
        InvalidInputError: a tensor is missing or has another shape.
    """
    layers = _layers(denoiser, prefix)
    cut = [(layer, state[f"{path}.order"], path) for path, layer in layers if f"{path}.order" in state]
    shared = [list(readers.values()) for readers in by_quantizer(dict(layers))]
    for layer, order, path in cut:
        if layer.order is None:
            layer.cut(tuple(state[f"{path}.split"].tolist()), order.to(layer.device))
    _share(shared, {id(layer) for layer, _, _ in cut})
    for path, layer in layers:
        for name in OF_LAYERS:
            value = state.get(f"{path}.{name}")
            setattr(layer, name, None if value is None else value.to(layer.device))
        for part in range(len(layer.input_quantizers)):
            if f"{path}.input.{part}.patches" in state:
                layer.quantize_patches(part)
    for path, attention in _attentions(denoiser, prefix):
        if (settings := state.get(f"{path}.probabilities.log2")) is not None:
            bits, start = settings.tolist()
            attention.probabilities = LogQuantizer(bits, bool(start))
    for name, quantizer in quantizers(denoiser, prefix):
        try:
            scale, zero_point = state[f"{name}.scale"], state[f"{name}.zero_point"]
        except KeyError as error:
            raise InvalidInputError(f"the quantized weights lack the tensor {error.args[0]}") from error
        if isinstance(quantizer, WeightQuantizer):
            if scale.shape != quantizer.scale.shape:
                raise InvalidInputError(f"{name}.scale has shape {list(scale.shape)}: it fits another model")
            quantizer.set(scale, zero_point)
            if f"{name}.codes" in state:
                try:
                    quantizer.hold(state[f"{name}.codes"], shapes[name])
                except (RuntimeError, KeyError, IndexError) as error:
                    raise InvalidInputError(
                        f"{name}.codes are not as many as its layer has weights"
                    ) from error
        else:
            edges = state.get(f"{name}.edges")
            axis = state.get(f"{name}.axis")
            groups = [] if edges is None else [len(edges) + 1]
            wanted = groups + list(scale.shape[len(groups) :][: 0 if axis is None else 1])
            fits = zero_point.shape == scale.shape or (
                not zero_point.ndim and edges is not None and axis is None
            )
            if not fits or list(scale.shape) != wanted:
                raise InvalidInputError(
                    f"{name}.scale has shape {list(scale.shape)}, which does not fit its groups of timesteps"
                )
            quantizer.set(scale, zero_point, edges, None if axis is None else int(axis))
    for path, layer in layers:
        layer.table = _table(state, path, current_timestep_of(denoiser), layer.device)


def check_state(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse scales and tables that no calibration makes: codes would stand for nothing.

    Args:
        state: named tensors (see `read_state`).
        where: what they were read from, for the message.

    Raises:
        InvalidInputError: a number is not finite, or a scale is not positive; the tensor is named.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.itemsize == 1:  # codes
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"{where} holds NaN or Inf in {name!r}: calibrate again")
        if name.endswith(".scale") and not bool((tensor > 0).all()):
            value = float(tensor.min())
            raise InvalidInputError(
                f"{where} holds a scale of {value:g} in {name!r}, but scales are positive: calibrate again"
            )


def _table(
    state: Mapping[str, Tensor], path: str, current: CurrentTimestep | None, device: torch.device
) -> FeatureTable | None:
    """The table of a temporal feature, if the state holds one."""
    rows, edges = state.get(f"{path}.feature.rows"), state.get(f"{path}.feature.edges")
    if rows is None:
        return None
    own = [state.get(f"{path}.feature.{name}") for name in ("scale", "zero_point")]
    lengths = [None if tensor is None else len(tensor) for tensor in own]
    steps = None if rows.is_floating_point() else len(rows)
    if edges is None or len(edges) != len(rows) - 1 or lengths != [steps, steps]:
        raise InvalidInputError(f"{path}.feature has {len(rows)} rows, and edges or scales that do not fit")
    return FeatureTable(rows, edges, current, *own).to(device)


def _share(groups: list[list[QuantizedLayer]], cut: set[int]) -> None:
    for group in groups:
        if len(group) > 1 and any(id(layer) in cut for layer in group):
            for layer in group[1:]:
                layer.input_quantizers = group[0].input_quantizers


def _layers(denoiser: nn.Module, prefix: str) -> list[tuple[str, QuantizedLayer]]:
    modules = denoiser.get_submodule(prefix).named_modules(prefix=prefix)
    return [(path, module) for path, module in modules if isinstance(module, QuantizedLayer)]


def _attentions(denoiser: nn.Module, prefix: str) -> list[tuple[str, AttentionQuantizers]]:
    modules = denoiser.get_submodule(prefix).named_modules(prefix=prefix)
    found = [(path, module) for path, module in modules if isinstance(module, AttentionQuantizers)]
    return [(path.removesuffix("_quantizers"), module) for path, module in found]


def code_shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of the codes of each weight quantizer, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in denoiser.named_modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizers:
            for part, shape in enumerate(module.part_shapes()):
                shapes[f"{path}.weight.{part}"] = shape
    return shapes
