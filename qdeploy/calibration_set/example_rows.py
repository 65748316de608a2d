"""Rows of noise, where nothing is learned from data: for the structure of a network and for its probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdeploy.model.inputs import denoise, example_inputs, rows_at_once
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import nn

    from qdeploy.model.folder import Model

ROWS, FEWEST = 16, 2


class ExampleRows:
    """Inputs drawn at random in the shapes that a model asks for, with the rows of a calibration set.

    Args:
        model: the model.
        rows: how many; by default `ROWS`, or fewer where the network takes few at once.
        seed: what they are drawn from.

    Raises:
        InvalidInputError: the model's configuration does not say what its inputs are.
    """

    def __init__(self, model: Model, rows: int | None = None, seed: int = 0) -> None:
        if rows is None:
            sample = next(iter(example_inputs(model, 1, seed).values()))
            rows = min(ROWS, max(FEWEST, rows_at_once(sample)))
        self._inputs = example_inputs(model, rows, seed)
        self.timesteps = self._inputs["timestep"]
        self.images = torch.arange(rows)

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, rows: Sequence[int] | Tensor, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The denoiser's inputs for some rows, each ``[len(rows), ...]``."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        return {name: values[chosen].to(device) for name, values in self._inputs.items()}

    def probe_inputs(
        self, rows: Sequence[int] | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """As `inputs`."""
        return self.inputs(rows, device)

    @property
    def carried(self) -> dict[str, Any]:
        """Facts that follow from a calibration set: none."""
        return {}

    def timestep_range(self, training: int | None) -> None:
        """Nothing is known but what the scheduler says."""
        return

    def check_fits(self, model: Model, denoiser: nn.Module) -> None:
        """Make sure that the network can take them.

        Raises:
            InvalidInputError: it wants inputs that its configuration does not describe.
        """
        with self.fitting(model), torch.no_grad():
            denoise(denoiser, self.inputs([0], _device(denoiser)))

    @contextmanager
    def fitting(self, model: Model) -> Iterator[None]:
        """Within, the network's first run with these inputs: a failure of it is theirs.

        Raises:
            InvalidInputError: it wants inputs that its configuration does not describe.
        """
        try:
            yield
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise InvalidInputError(
                f"inputs of a {model.class_name} cannot be drawn at random: pass a calibration set"
            ) from error


def _device(denoiser: nn.Module) -> torch.device:
    """Where a network is; weights that are read at each call are nowhere."""
    there = (parameter.device for parameter in denoiser.parameters() if not parameter.is_meta)
    return next(there, torch.device("cpu"))
