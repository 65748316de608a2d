"""Why min-max W8A8 breaks the network of `benchmarks.terrain`: by timestep, by channel, by layer.

Codes: how many of the 256 codes of its quantizer a tensor, and each of its channels, reaches at one timestep. Noise:
what each activation quantizer alone adds to the output's error, to first order, from random projections of the
output: for v ~ N(0, I), E[(v . J e)^2] = |J e|^2, where e is the quantizer's error and J^T v comes from one backward
pass.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.store.artifact import Checkpoint, open_artifact
from qdeploy.system.decibels import decibels

FEW = 16  # codes: what a channel that reaches fewer has is less than 4 bits
PROBES = 8  # random projections for each row; an estimate of noise is within about 2 dB


def causes(folder: Path) -> dict[str, Any]:
    """Codes of both checkpoints, and the noise of the first one's quantizers; on the two unseen seeds."""
    unseen = CalibrationSet.open(folder / "set-900-2")
    networks = {
        name: load_checkpoint(open_artifact(folder / f"checkpoint-{name}", Checkpoint)).eval()
        for name in ("w8a8-minmax-cpu", "w8a8-smoothquant-outliers")
    }
    codes = {name: codes_reached(network, unseen) for name, network in networks.items()}
    return {"codes": codes, "noise": noise_by_layer(networks["w8a8-minmax-cpu"], unseen)}


def label(timestep: Tensor) -> str:
    """A timestep as it stands in results."""
    return str(round(float(timestep)))


def codes_reached(network: nn.Module, data: CalibrationSet) -> dict[str, dict[str, float]]:
    """By timestep: codes that the median tensor and the median channel reach, and the share of channels with few."""
    tensors: dict[str, list[float]] = {}
    channels: dict[str, list[Tensor]] = {}
    now = ""

    def before(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantizedLayer)
        parts = zip(layer.activation_quantizers, layer.input_parts(given[0]), strict=True)
        for quantizer, part in parts:
            scale = quantizer.scale
            if quantizer.banked:
                assert quantizer.current_timestep is not None
                scale = scale[quantizer.current_timestep.index(quantizer.edges)]
            rows = part.movedim(layer.feature_axis, 0).flatten(1)
            low, high = rows.amin(1), rows.amax(1)
            tensors.setdefault(now, []).append(float((high.amax() - low.amin()) / scale))
            channels.setdefault(now, []).append((high - low) / scale)

    hooks = [layer.register_forward_pre_hook(before) for layer in quantized_layers(network).values()]
    with torch.no_grad():
        for row in range(len(data)):
            now = label(data.timesteps.flatten()[row])
            denoise(network, data.inputs([row]))
    for hook in hooks:
        hook.remove()
    return {
        timestep: {
            "tensor": round(median(found)),
            "channel": round(float(torch.cat(channels[timestep]).median())),
            "few": round(float((torch.cat(channels[timestep]) < FEW).float().mean()), 3),
        }
        for timestep, found in tensors.items()
    }


def noise_by_layer(network: nn.Module, data: CalibrationSet) -> dict[str, Any]:
    """By timestep: SQNR in dB that each activation quantizer alone would leave, and how many make half the noise."""
    names: dict[nn.Module, str] = {}
    for path, layer in quantized_layers(network).items():
        for number, quantizer in enumerate(layer.activation_quantizers):
            names.setdefault(quantizer, f"{path}/{number}" if layer.split else path)
    seen: list[tuple[str, Tensor, Tensor]] = []

    def after(quantizer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        (x,) = given
        with torch.no_grad():
            quantizer.enabled = True
            error = quantizer.forward(x) - x
            quantizer.enabled = False
        if output.requires_grad:  # what the timestep alone leads to is left out
            seen.append((names[quantizer], output, error))

    for quantizer in names:
        quantizer.enabled = False  # type: ignore[assignment]
    hooks = [quantizer.register_forward_hook(after) for quantizer in names]
    signal: dict[str, float] = {}
    noise: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for row in range(len(data)):
        now = label(data.timesteps.flatten()[row])
        seen.clear()
        inputs = data.inputs([row])
        inputs["sample"].requires_grad_()
        output = denoise(network, inputs)
        signal[now] = signal.get(now, 0.0) + float(output.detach().square().sum())
        own = noise.setdefault(now, {})
        for _ in range(PROBES):
            v = torch.randn(output.shape, generator=generator)
            slopes = torch.autograd.grad(output, [x for _, x, _ in seen], v, retain_graph=True)
            felt: dict[str, float] = {}
            for (name, _, error), slope in zip(seen, slopes, strict=True):
                felt[name] = felt.get(name, 0.0) + float((slope * error).sum())
            for name, value in felt.items():
                own[name] = own.get(name, 0.0) + value**2 / PROBES
    for hook in hooks:
        hook.remove()
    return {timestep: _summary(signal[timestep], found) for timestep, found in noise.items()}


def _summary(signal: float, noise: dict[str, float]) -> dict[str, Any]:
    ranked = sorted(noise.items(), key=lambda item: -item[1])
    total, half, reached = sum(noise.values()), 0, 0.0
    for half, (_, own) in enumerate(ranked, 1):  # noqa: B007
        reached += own
        if reached >= total / 2:
            break
    return {
        "all": round(decibels(signal, total), 1),
        "quantizers": len(ranked),
        "half_of_the_noise": half,
        "median": round(decibels(signal, median(noise.values())), 1),
        "worst": {name: round(decibels(signal, own), 1) for name, own in ranked[:6]},
    }
