"""Graphs for images of several sizes and prompts of any length: what is dynamic in them, and how that is proven."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qdeploy.export.trace import trace
from qdeploy.model.folder import Model
from qdeploy.model.inputs import denoise_rows, sample_name
from qdeploy.store.artifact import Bundle
from qdeploy.store.builder import Draft
from qdeploy.store.facts import SizesFacts
from qdeploy.store.sizes import read_sizes, size_probe, sizes_to_prove, with_size
from qdeploy.system.errors import CapabilityError, UsageError


def plan_sizes(model: Model, pipeline: Path, text: str | None, target: str) -> SizesFacts | None:
    """What ``--sizes`` asks of a model; None for the one size of its inputs.

    Args:
        model: the denoiser.
        pipeline: folder of its pipeline, whose autoencoder tells how many pixels a latent stands for.
        text: see `read_sizes`; None for one size.
        target: the dialect.

    Raises:
        UsageError: no sizes, sizes that the model cannot take, or a dialect whose graphs have one size.
        CapabilityError: the model is no U-Net: transformers compute the positions of one size into their graph.
    """
    if text is None:
        return None
    if target == "onnxruntime":
        raise UsageError(
            "the dialect of target onnxruntime has the size of images in its indices: export with --target portable"
        )
    levels = model.config.get("block_out_channels")
    if not model.class_name.startswith("UNet") or not isinstance(levels, list):
        raise CapabilityError(
            f"--sizes is for U-Nets: the graph of a {model.class_name} holds the positions of one size"
        )
    return read_sizes(text, _pixels_of_a_latent(pipeline), 2 ** (len(levels) - 1))


def _pixels_of_a_latent(pipeline: Path) -> int:
    for name in ("vae", "vqvae"):
        config = pipeline / name / "config.json"
        if config.is_file():
            return int(2 ** (len(json.loads(config.read_text()).get("block_out_channels", [0])) - 1))
    return 1


def prove_sizes(
    draft: Draft[Bundle], denoiser: nn.Module, inputs: Mapping[str, Tensor], sizes: SizesFacts
) -> SizesFacts:
    """Write what the network gives at each size to prove, as ``sizes/HEIGHTxWIDTH.safetensors``, two rows each.

    Args:
        draft: of the bundle.
        denoiser: quantized or not.
        inputs: the probe's.
        sizes: that were asked for.

    Returns:
        The sizes, with that of the probe among them.
    """
    sample = inputs[sample_name(denoiser)]
    sizes = with_size(sizes, sample.shape[2], sample.shape[3])
    for height, width in sizes_to_prove(sizes):
        rows = {name: value[:2] for name, value in _at_size(denoiser, inputs, height, width).items()}
        draft.tensors(size_probe(height, width), partial(_computed, denoiser, rows))
    return sizes


def _computed(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs and what the network computes for them, quantized if it is, named as in a probe."""
    probe = {f"input.{name}": tensor for name, tensor in inputs.items()}
    with torch.no_grad():
        return {**probe, "reference": denoise_rows(denoiser, inputs)}


def trace_sizes(denoiser: nn.Module, inputs: Mapping[str, Tensor], sizes: SizesFacts | None) -> ir.Model:
    """Trace a denoiser, for the size of its inputs alone or for any.

    Args:
        denoiser: see `trace`.
        inputs: see `trace`.
        sizes: see `plan_sizes`; None for the one of the inputs.

    Raises:
        InvalidInputError: the network cannot be traced.
        CapabilityError: its graph has one size although several were asked for.
    """
    if sizes is None:
        return trace(denoiser, inputs)
    name = sample_name(denoiser)
    axes = {name: {2: "height", 3: "width"}}
    for other, value in inputs.items():
        if other.startswith("encoder_") and value.ndim > 1:
            axes[other] = {1: "tokens"}
    # Height and width differ, else the tracer would take them for one number.
    size = max(2 * sizes.multiple, 8)
    graph = trace(denoiser, _at_size(denoiser, inputs, size, 2 * size), axes)
    shape = next(value.shape for value in graph.graph.inputs if value.name == name)
    if shape is None or any(isinstance(axis, int) for axis in list(shape)[2:]):
        kind = type(denoiser).__name__
        raise CapabilityError(f"the graph of this {kind} has one size: export it without --sizes")
    return graph


def _at_size(denoiser: nn.Module, inputs: Mapping[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Inputs whose sample has another size: repeated side by side and cut, which keeps its noise what it is."""
    name = sample_name(denoiser)
    sample = inputs[name]
    repeats = (1, 1, -(-height // sample.shape[2]), -(-width // sample.shape[3]))
    return {**inputs, name: sample.repeat(*repeats)[:, :, :height, :width].contiguous()}
