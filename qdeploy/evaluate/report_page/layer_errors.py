"""The error of each layer: its own, and accumulated from the layers before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.model.folder import Model
from qdeploy.model.inputs import denoise
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.store.artifact import Checkpoint
from qdeploy.system.decibels import decibels, powers

_ROWS = 4  # of the probe, evenly spread over its timesteps


def layer_errors(checkpoint: Checkpoint, model: Model, rows: int = _ROWS) -> dict[str, Any]:
    """The error of every quantized layer's output on held-out inputs.

    The full-precision network runs first, one row at a time; then the quantized one, in which every layer
    computes twice: for its input there, and for the input of the full-precision layer.

    Args:
        checkpoint: what is examined.
        model: the full-precision model that it was made from.
        rows: how many rows of the probe.

    Returns:
        ``timesteps`` of the rows; and ``layers``, in the order of execution, each with its ``name``, the SQNR of
        its output for the full-precision input (``own_db``), and in the running network (``piled_up_db``).
        Layers that a table replaced are left out.
    """
    reference, student = model.load(), load_checkpoint(checkpoint)
    inputs = checkpoint.probe().inputs
    count = len(inputs["timestep"])
    chosen = torch.linspace(0, count - 1, min(rows, count)).round().long().unique()
    own: dict[str, list[tuple[float, float]]] = {}
    piled: dict[str, list[tuple[float, float]]] = {}
    layers = {name: layer for name, layer in quantized_layers(student).items() if layer.table is None}
    for row in chosen.tolist():
        single = {name: x[row : row + 1] for name, x in inputs.items()}
        seen = _inputs_and_outputs(reference, list(layers), single)
        for name, (ours, local) in _compare(student, layers, single, seen).items():
            _, expected = seen[name]
            own.setdefault(name, []).append(powers(local, expected))
            piled.setdefault(name, []).append(powers(ours, expected))
    return {
        "timesteps": [float(t) for t in inputs["timestep"].flatten()[chosen]],
        "layers": [
            {"name": name, "own_db": _pooled(own[name]), "piled_up_db": _pooled(piled[name])} for name in own
        ],
    }


def _pooled(parts: list[tuple[float, float]]) -> float:
    signal, noise = (sum(part[index] for part in parts) for index in (0, 1))
    return round(decibels(signal, noise), 2)


def _inputs_and_outputs(
    network: nn.Module, paths: list[str], inputs: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of layers in one call, in the order of execution; of repeated calls the last."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(call: ModuleCall) -> None:
        seen[call.name] = call.input, call.output

    layers = {path: network.get_submodule(path) for path in paths}
    with torch.no_grad(), observing(layers, after=keep):
        denoise(network, inputs)
    return seen


def _compare(
    network: nn.Module,
    layers: dict[str, QuantizedLayer],
    inputs: dict[str, Tensor],
    seen: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs of quantized layers in the running network, and for the inputs that were seen."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def compare(call: ModuleCall) -> None:
        if call.name in seen:  # within the call, since scales may depend on its timestep
            found[call.name] = call.output, layers[call.name].forward(seen[call.name][0])

    with torch.no_grad(), observing(layers, after=compare):
        denoise(network, inputs)
    return {path: found[path] for path in seen if path in found}
