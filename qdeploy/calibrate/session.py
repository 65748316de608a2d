"""A calibration in progress: what every stage works on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdeploy.calibrate.attention import AttentionQuantizers, quantize_attention
from qdeploy.calibrate.coverage import covered, find_coverage, float_inputs
from qdeploy.calibrate.effort import Effort, find_effort
from qdeploy.calibrate.fakequant import (
    QuantizedLayer,
    full_precision,
    quantized_layers,
    replace_module,
    weights_only,
)
from qdeploy.calibrate.quantizers import ActivationQuantizer
from qdeploy.calibrate.reconstruct import Recorder, UnitProblem, record_unit
from qdeploy.calibrate.state import code_shapes, read_state, write_state
from qdeploy.calibrate.timestep_groups import RANGES
from qdeploy.clock import attach_clock, clock_of
from qdeploy.draft import Draft
from qdeploy.errors import UsageError
from qdeploy.formats import BLOCKS, Format, uint8
from qdeploy.inputs import rows_at_once, sample_name
from qdeploy.overrides import check_overrides
from qdeploy.recipe import Recipe
from qdeploy.structure import Layer, Structure
from qdeploy.targets import find_target
from qdeploy.thin import thin_conv, thin_float_conv, thin_product

if TYPE_CHECKING:
    from qdeploy.calibrate.dataset import CalibrationSet

HELD_OUT = 8  # one image in so many is kept to judge by


def quantize_structure(denoiser: nn.Module, structure: Structure, recipe: Recipe) -> list[Layer]:
    """Put quantizers where a recipe's coverage wants them.

    Layers of a unit that read the same tensor share their input quantizer.

    Returns:
        The covered layers, in execution order, but those of `left_in_float`.

    Raises:
        UsageError: no layer is left to quantize.
    """
    coverage = find_coverage(recipe.coverage)
    wanted = covered(structure, coverage, recipe.exclude)
    check_overrides(recipe.layers, (layer.path for layer in wanted), recipe.coverage)
    left = left_in_float(denoiser, structure, recipe)
    layers = [layer for layer in wanted if layer.path not in left]
    if left and not layers:
        raise UsageError(f"nothing would be quantized: {_counted(left)}")
    bare = float_inputs(layers, coverage)
    for layer in layers:
        inner = denoiser.get_submodule(layer.path)
        split = layer.split if coverage.split else ()
        weights, own = recipe.formats(layer.path)
        seen = None if layer.path in bare else own
        replace_module(denoiser, layer.path, QuantizedLayer(inner, weights, seen, split))
    share_inputs(denoiser, {layer.path: layer.reads for layer in layers})
    if recipe.attention is not None:
        for path in structure.attentions:
            quantize_attention(denoiser.get_submodule(path), AttentionQuantizers(recipe.attention, uint8))
    set_clock(denoiser)
    return layers


def left_in_float(denoiser: nn.Module, structure: Structure, recipe: Recipe) -> dict[str, str]:
    """Layers of the coverage that the target or the format has no use for: why, by path."""
    coverage = find_coverage(recipe.coverage)
    left = {}
    for layer in covered(structure, coverage, recipe.exclude):
        module = denoiser.get_submodule(layer.path)
        weights, _ = recipe.formats(layer.path)
        if weights is None:
            left[layer.path] = "as the recipe says"
            continue
        reason = _unfit(module, layer if coverage.split else replace(layer, split=()), weights)
        # temporal layers need no kernel: they end in a table
        if not reason and not layer.temporal and not find_target(recipe.target).thin:
            reason = "too thin to gain" if _thin(module, layer, weights) else ""
        if reason:
            left[layer.path] = reason
    return left


def _unfit(module: nn.Module, layer: Layer, weights: Format | None) -> str:
    """Why a format has no place for a layer's weight; empty if it has."""
    if weights is None or not weights.block:
        return ""
    if not isinstance(module, nn.Linear):
        return "a convolution, and blocks are for linear layers"
    widths = layer.split or (module.in_features,)
    odd = next((width for width in widths if weights.fitting(width) is None), None)
    return "" if odd is None else f"{odd} input features are no whole blocks of {min(BLOCKS)}"


def _counted(left: Mapping[str, str]) -> str:
    return "; ".join(f"{number} layers: {reason}" for reason, number in Counter(left.values()).items())


def set_clock(denoiser: nn.Module) -> None:
    """Let every quantizer of a network know the timestep of the running call."""
    clock = attach_clock(denoiser)
    for module in denoiser.modules():
        if isinstance(module, ActivationQuantizer):
            module.clock = clock


def _thin(module: nn.Module, layer: Layer, weights: Format | None = None) -> bool:
    """Whether a layer, or a half of it that is quantized on its own, is too thin to gain."""
    weight = module.get_parameter("weight")
    parts = [(weight.shape[0], inner, *weight.shape[2:]) for inner in layer.split or weight.shape[1:2]]
    if isinstance(module, nn.Linear):
        rows = layer.macs // weight.numel()
        return any(thin_product(part[0], part[1], rows) for part in parts)
    group = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
    if weights is not None and weights.floating:
        return any(thin_float_conv(part, group) for part in parts)
    return any(thin_conv(part, group, layer.first) for part in parts)


def share_inputs(denoiser: nn.Module, reads: dict[str, str]) -> None:
    """Let layers that read one tensor use one input quantizer; ``reads`` maps each to the first of them."""
    layers = quantized_layers(denoiser)
    for path, first in reads.items():
        if first == path or first not in layers or layers[first].split != layers[path].split:
            continue
        if layers[first].formats[1] == layers[path].formats[1] and _quantizes_input(
            layers[first], layers[path]
        ):
            layers[path].input_quantizers = layers[first].input_quantizers


def _quantizes_input(*layers: QuantizedLayer) -> bool:
    return all(len(layer.input_quantizers) for layer in layers)


@dataclass
class Session:
    """What a stage is given.

    Attributes:
        denoiser: the network, teacher and student in one.
        structure: what it is made of.
        layers: the covered layers, in execution order.
        data: the calibration set.
        recipe: the resolved recipe.
        draft: the checkpoint in the making; holds the journal of finished steps.
        device: where the network is.
        max_memory: bytes that recorded activations may take.
        report: what stages found out about their work; kept with the checkpoint's measurements.
        stage: the stage that is running, with its place in the recipe; names its steps in the journal.
        training_timesteps: how many timesteps the model was trained with, if its scheduler says so.
        component: the denoiser's name in its pipeline.
        prediction_type: what its output is, as of `qdeploy.correction_table.prediction_type`.
        left: layers of the coverage that stay in float all the same: why, by path.
    """

    denoiser: nn.Module
    structure: Structure
    layers: list[Layer]
    data: CalibrationSet
    recipe: Recipe
    draft: Draft
    device: str = "cpu"
    max_memory: int = 4 * 2**30
    report: dict[str, Any] = field(default_factory=dict)
    stage: str = "stage"
    training_timesteps: int | None = None
    component: str = "unet"
    prediction_type: str = "epsilon"
    left: dict[str, str] = field(default_factory=dict)

    @property
    def effort(self) -> Effort:
        """How much work to do."""
        return find_effort(self.recipe.effort)

    @cached_property
    def batch(self) -> int:
        """Rows of one pass through the whole network: those of the effort, or fewer where they are large."""
        return min(self.effort.batch, rows_at_once(self.inputs([0])[sample_name(self.denoiser)]))

    def generator(self, *names: str) -> torch.Generator:
        """Randomness for one purpose, the same however the work was interrupted."""
        digest = sha256(f"{self.recipe.seed}/{'/'.join(names)}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def rows(self) -> list[int]:
        """The rows this effort uses, a random choice from the whole set in ascending order."""
        order = torch.randperm(len(self.data), generator=self.generator("rows"))
        return sorted(order[: self.effort.rows].tolist())

    def split(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Positions in ``rows`` to learn from, and positions to judge by.

        Whole images are held out, since rows of one trajectory are alike.
        """
        images = self.data.images[list(rows)]
        held = images % HELD_OUT == HELD_OUT - 1
        if held.all() or not held.any():
            held = torch.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
        if not held.any():
            everything = torch.arange(len(rows))
            return everything, everything
        return (~held).nonzero().flatten(), held.nonzero().flatten()

    def keep_ranges(self, ranges: dict[str, Tensor]) -> None:
        """Keep the ranges of tensors over time with the checkpoint."""
        self.draft.tensors(f"{self.component}/{RANGES}", lambda: ranges)

    def all_timesteps(self) -> Tensor:
        """[T] every timestep that the network may be asked for, ascending, in the data's dtype.

        Those of training, and those of the calibration set where these are fractional.
        """
        seen = self.data.timesteps.flatten()
        if self.training_timesteps is not None:
            seen = torch.cat([seen, torch.arange(self.training_timesteps).to(seen.dtype)])
        distinct: Tensor = seen.unique()
        return distinct

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The denoiser's inputs for some rows, on the device."""
        return self.data.inputs(rows, device=self.device)

    @property
    def units(self) -> dict[str, list[Layer]]:
        """Covered layers by unit, in execution order."""
        units: dict[str, list[Layer]] = {}
        for layer in self.layers:
            units.setdefault(layer.unit, []).append(layer)
        return units

    def quantized(self, layers: Sequence[Layer]) -> list[QuantizedLayer]:
        """The modules of some covered layers."""
        modules = quantized_layers(self.denoiser)
        return [modules[layer.path] for layer in layers]

    def once(self, name: str, compute: Callable[[], None], prefix: str = "") -> None:
        """Do a step that changes quantizers below ``prefix``, or take over its result from the journal."""

        def computed() -> dict[str, Tensor]:
            compute()
            return read_state(self.denoiser, prefix)

        step = f"{self.stage}-{name}"
        write_state(self.denoiser, self.draft.step(step, computed), code_shapes(self.denoiser), prefix)

    def problem(self, unit: str, student: Callable[[], Any]) -> Any:
        """Context manager: the reconstruction problem of a unit, its inputs from the ``student`` mode."""
        rows = self.rows()
        recorder = Recorder(
            self.denoiser,
            self.inputs,
            rows,
            self.batch,
            self.draft.work / "scratch",
            self.max_memory,
        )
        return _Problem(self, unit, recorder, rows, student)

    def teacher(self) -> Any:
        """Context manager: the network in full precision."""
        return full_precision(self.denoiser)

    def weights_only(self) -> Any:
        """Context manager: quantized weights, float activations."""
        return weights_only(self.denoiser)


class _Problem:
    def __init__(
        self, session: Session, unit: str, recorder: Recorder, rows: list[int], student: Callable[[], Any]
    ) -> None:
        self.session, self.rows = session, rows
        self.unit = session.denoiser.get_submodule(unit)
        self.recording = record_unit(recorder, self.unit, session.teacher, student)

    def __enter__(self) -> UnitProblem:
        inputs, targets = self.recording.__enter__()
        learn, judge = self.session.split(self.rows)
        timesteps = self.session.data.timesteps[self.rows].flatten()
        clock = clock_of(self.session.denoiser)
        return UnitProblem(self.unit, inputs, targets, learn, judge, self.session.device, clock, timesteps)

    def __exit__(self, *error: Any) -> None:
        self.recording.__exit__(*error)
