"""Calibration sets: the denoiser's own inputs along the sampling trajectory, read from disk.

`qdeploy.calibration_set.collect` and `qdeploy.calibration_set.importers` write them; the storage format is described
in `qdeploy.calibration_set.shards`. Nothing is loaded whole: tensors are memory-mapped, and what is asked for is
copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdeploy.calibration_set.plausible import check_rows, check_timesteps
from qdeploy.calibration_set.shards import Shard, open_shards
from qdeploy.model.call import CallForm, signature_of, time_parameter
from qdeploy.model.inputs import attach_form, denoise, sample_name
from qdeploy.store.artifact import CalibrationFolder, open_artifact
from qdeploy.store.data_facts import CalibrationSetFacts
from qdeploy.store.facts import RangeFacts
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import nn

    from qdeploy.model.folder import Model


class CalibrationSet:
    """Rows of denoiser inputs.

    Attributes:
        artifact: the folder on disk.
        sample: name of the input that holds the noisy sample.
    """

    def __init__(self, artifact: CalibrationFolder, shards: Sequence[Shard]) -> None:
        self.artifact = artifact
        self.sample = artifact.facts.sample
        self._shards = list(shards)
        self._layout = shards[0].layout()
        self._starts = torch.tensor([0, *(shard.rows for shard in shards)]).cumsum(0)
        if f"input.{self.sample}" not in shards[0]:
            raise InvalidInputError(f"{artifact.path} does not say which of its inputs is the noisy sample")

    @classmethod
    def open(cls, path: str | Path) -> CalibrationSet:
        """Read and verify a calibration set.

        Raises:
            InvalidInputError: it is no calibration set, or is damaged, empty or inconsistent, or holds NaN.
        """
        path = Path(path)
        if path.is_file():
            raise InvalidInputError(
                f"{path} is a file, not a calibration set: if it is a .pt file in Q-Diffusion's layout, "
                "import it with `qdeploy collect MODEL --from-qdiffusion FILE`"
            )
        artifact = open_artifact(path, CalibrationFolder)
        return cls(artifact, open_shards(path, artifact.shards))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sha256(self) -> str:
        """Identity of the set."""
        return self.artifact.sha256

    @property
    def facts(self) -> CalibrationSetFacts:
        """What the set says of itself: inputs, rows, images, timesteps, scheduler, guidance, ..."""
        return self.artifact.facts

    @property
    def form(self) -> CallForm | None:
        """How the denoiser is called; None for calls that are plain (see `qdeploy.model.call`)."""
        return CallForm.of(self.facts.call)

    @property
    def carried(self) -> dict[str, Any]:
        """Facts that everything made from this set carries: how the denoiser is called, and how it was sampled."""
        return {"call": self.facts.call, "sampled": self.facts.sampled}

    def timestep_range(self, training: int | None) -> RangeFacts | None:
        """The timesteps that the network can be called with (see `qdeploy.calibration_set.timestep_range`).

        Sets of before it was recorded are asked for their own timesteps.

        Args:
            training: how many timesteps the model was trained with, if that is known.
        """
        if self.facts.sampled is not None:
            return self.facts.range
        low, high = float(self.timesteps.min()), float(self.timesteps.max())
        if (
            training is None
            or (low >= 0 and 1 < high <= training - 1)
            or not self.timesteps.is_floating_point()
        ):
            return None
        return RangeFacts(low=low, high=high, slope=None, offset=None)

    @cached_property
    def timesteps(self) -> Tensor:
        """The t that the network was given, ``[rows]``, in its own dtype; may be fractional."""
        return self._column("input.timestep")

    @cached_property
    def images(self) -> Tensor:
        """Number of the image that each row comes from, ``[rows]`` int64."""
        return self._column("image")

    @cached_property
    def conditional(self) -> Tensor | None:
        """Which rows are conditional under guidance, ``[rows]`` bool; None without guidance or if unknown."""
        return self._column("conditional") if "conditional" in self._shards[0] else None

    def _column(self, name: str) -> Tensor:
        return torch.cat([shard.tensor(name) for shard in self._shards])

    def inputs(self, rows: Sequence[int] | Tensor, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The denoiser's inputs for some rows, in the order asked for; repetitions are allowed.

        Args:
            rows: numbers of rows.
            device: where the tensors shall be.

        Returns:
            Inputs by flattened parameter name, each ``[len(rows), ...]``; inputs that have no batch dimension
            come as the network was given them.

        Raises:
            IndexError: there is no such row.
        """
        wanted = torch.as_tensor(rows, dtype=torch.int64).cpu().reshape(-1)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"the calibration set has rows 0 to {len(self) - 1}")
        owners = torch.searchsorted(self._starts, wanted, right=True) - 1
        inputs = {}
        for name, form in self._layout.items():
            if form["shared"]:
                inputs[name] = self._shards[0].tensor(f"shared.{name}").clone().to(device)
                continue
            result = torch.empty(len(wanted), *form["shape"], dtype=getattr(torch, form["dtype"]))
            for owner in set(owners.tolist()):
                places = (owners == owner).nonzero().flatten()
                result[places] = _rows(self._shards[owner], name, wanted[places] - self._starts[owner])
            inputs[name] = result.to(device)
        return inputs

    def probe_inputs(
        self, rows: Sequence[int] | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """As `inputs`, for probes and graphs, in which every input has rows.

        An input that has no batch dimension is repeated for each row; the network is given the first of them
        (`qdeploy.model.call.CallForm`).
        """
        inputs = self.inputs(rows, device)
        count = len(inputs["timestep"])
        shared = [name for name, form in self._layout.items() if form["shared"]]
        return inputs | {name: inputs[name].expand(count, *inputs[name].shape).clone() for name in shared}

    def check_fits(self, model: Model, denoiser: nn.Module) -> None:
        """Make sure that the set belongs to a model, by its hash, its input names, its numbers and one call.

        From then on `qdeploy.model.inputs.denoise` calls the network as the set says.

        Args:
            model: the model on disk.
            denoiser: the network, loaded from it.

        Raises:
            InvalidInputError: the set was made from another model, holds a row or a timestep that cannot be from
                its trajectory, or the network cannot take its rows.
        """
        path, made_from = self.artifact.path, self.artifact.made_from.get("model")
        if made_from != model.sha256:
            raise InvalidInputError(
                f"the calibration set {path} was made from another model than {model.path}: "
                "collect one from this model"
            )
        known = signature_of(denoiser).parameters
        time = time_parameter(known)
        named = list(self.form.arguments) if self.form else [name.partition(".")[0] for name in self._layout]
        foreign = [name for name in named if name not in known and not (name == "timestep" and time)]
        if foreign or self.sample != sample_name(denoiser):
            what = (foreign or [self.sample])[0]
            raise InvalidInputError(
                f"the calibration set {path} has an input {what!r} that {model.class_name} has not"
            )
        training = model.training_timesteps
        check_timesteps(
            self.timesteps, training, self.timestep_range(training), f"the calibration set {path}"
        )
        check_rows(self._shards, f"the calibration set {path}")
        attach_form(denoiser, self.form)
        first = next(denoiser.parameters(), torch.empty(0))
        try:
            with torch.no_grad():
                denoise(denoiser, self.inputs([0], device=first.device))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(
                f"the calibration set {path} does not fit {model.class_name}: {reason}"
            ) from error


def _rows(shard: Shard, name: str, rows: Tensor) -> Tensor:
    if f"input.{name}" in shard:
        return shard.tensor(f"input.{name}")[rows]
    return shard.tensor(f"condition.{name}")[shard.tensor("condition_row")[rows]]
