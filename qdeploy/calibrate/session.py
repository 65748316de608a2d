"""A calibration in progress: what every stage works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from qdeploy.model.inputs import rows_at_once, sample_name
from qdeploy.network.readers import readers_of
from qdeploy.network.roles import Layer, Structure
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import full_precision, weights_only
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.quant.state import code_shapes, quantizers, read_state, write_state
from qdeploy.recipe.effort import Effort, find_effort
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import RANGES
from qdeploy.store.builder import Draft
from qdeploy.store.facts import RangeFacts
from qdeploy.system.errors import CapabilityError
from qdeploy.system.processes import of_the_first

if TYPE_CHECKING:
    from qdeploy.calibration_set.dataset import CalibrationSet
    from qdeploy.calibration_set.example_rows import ExampleRows

T = TypeVar("T")
HELD_OUT = 8  # one image in so many is kept to judge by


@dataclass
class Session:
    """What a stage is given.

    Attributes:
        denoiser: the network, teacher and student in one.
        structure: what it is made of.
        layers: the covered layers, in execution order.
        data: the calibration set; rows of noise where no stage looks at rows.
        recipe: the resolved recipe.
        draft: the checkpoint in the making; holds the journal of finished steps.
        device: where the network is.
        max_memory: bytes that recorded activations may take.
        report: what stages found out about their work; kept with the checkpoint's measurements.
        stage: the stage that is running, with its place in the recipe; names its steps in the journal.
        timestep_range: of a network that is not called with its scheduler's whole numbers; see
            `qdeploy.store.timesteps`.
        training_timesteps: how many timesteps the model was trained with, if its scheduler says so.
        component: the denoiser's name in its pipeline.
        prediction_type: what its output is (see `qdeploy.store.correction_table.prediction_type`).
        left: layers of the coverage that stay in float all the same: why, by path.
        pass_seconds: about how long the network takes for one row.
    """

    denoiser: nn.Module
    structure: Structure
    layers: list[Layer]
    data: CalibrationSet | ExampleRows
    recipe: Recipe
    draft: Draft[Any]
    device: str = "cpu"
    max_memory: int = 4 * 2**30
    report: dict[str, Any] = field(default_factory=dict)
    stage: str = "stage"
    training_timesteps: int | None = None
    timestep_range: RangeFacts | None = None
    component: str = "unet"
    prediction_type: str = "epsilon"
    left: dict[str, str] = field(default_factory=dict)
    pass_seconds: float = 0.0
    _begun: set[str] = field(default_factory=set, repr=False)

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

    def rows(self, most: int | None = None) -> list[int]:
        """The rows this effort uses, or ``most`` of them: a random choice from the whole set, in ascending order."""
        order = torch.randperm(len(self.data), generator=self.generator("rows"))
        return sorted(order[: self.effort.rows][:most].tolist())

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

        Those of training, and those of the calibration set where these are fractional; those of the set alone where
        the network is called with other numbers than its scheduler's.
        """
        seen = self.data.timesteps.flatten()
        if self.training_timesteps is not None and self.timestep_range is None:
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

    @cached_property
    def readers(self) -> dict[str, set[str]]:
        """Which units read what each of them returns, of the network and not only of what is covered."""
        units = {unit: self.denoiser.get_submodule(unit) for unit in self.structure.units}
        with self.teacher():
            return readers_of(self.denoiser, units, self.inputs([0]))

    def quantized(self, layers: Sequence[Layer]) -> list[QuantizedLayer]:
        """The modules of some covered layers."""
        modules = quantized_layers(self.denoiser)
        return [modules[layer.path] for layer in layers]

    def once(self, name: str, compute: Callable[[], T], prefix: str = "") -> T:
        """Do a step that changes quantizers below ``prefix``, or take over its result from the journal.

        Args:
            name: of the step, unique within its stage; the path of its layer or unit, where it is for one.
            compute: does it; what it returns, a JSON value, is kept too.
            prefix: of the paths of quantizers that it changes.

        Returns:
            What ``compute`` returned, in this run or in the one that was stopped.

        Raises:
            CapabilityError: the stage uses a name twice, or gives a weight's scales another shape than its format's.
        """
        step = f"{self.stage}-{name}"
        if step in self._begun:
            raise CapabilityError(
                f"stage {self.stage} does two steps under the name {name!r}: the second would take over the result "
                "of the first; name each by what it is for, such as its layer's path"
            )
        self._begun.add(step)

        def computed() -> tuple[dict[str, Tensor], T]:
            value = compute()
            self._check_shapes(prefix)
            return of_the_first((read_state(self.denoiser, prefix), value))

        state, value = self.draft.step_with_value(step, computed)
        write_state(self.denoiser, state, code_shapes(self.denoiser), prefix)
        return value

    def _check_shapes(self, prefix: str) -> None:
        for name, quantizer in quantizers(self.denoiser, prefix):
            if isinstance(quantizer, WeightQuantizer) and quantizer.scale.shape != quantizer.shape:
                raise CapabilityError(
                    f"stage {self.stage} gives {name} scales of shape {list(quantizer.scale.shape)}: "
                    f"{quantizer.format.name} takes {list(quantizer.shape)} there"
                )

    def teacher(self) -> Any:
        """Context manager: the network in full precision."""
        return full_precision(self.denoiser)

    def weights_only(self) -> Any:
        """Context manager: quantized weights, float activations."""
        return weights_only(self.denoiser)
