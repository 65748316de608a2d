"""The probe: held-out inputs of a denoiser with their expected outputs, which travel with artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qdeploy.store.tensors import load_tensors
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


PROBE = "probe.safetensors"


class Probe(NamedTuple):
    """A few denoiser inputs and what networks compute for them.

    Attributes:
        inputs: by name, ``[rows, ...]`` each.
        reference: output of the full-precision model.
        simulated: output of the fake-quantized model; None where nothing is quantized.
    """

    inputs: dict[str, Tensor]
    reference: Tensor
    simulated: Tensor | None

    @property
    def expected(self) -> Tensor:
        """What an engine should compute: the simulated output, where there is one."""
        return self.reference if self.simulated is None else self.simulated


def read_probe(folder: Path, name: str = PROBE) -> Probe:
    """The probe in a folder.

    Args:
        folder: the artifact's.
        name: of the file; a bundle of several sizes has one for each size to prove.

    Raises:
        InvalidInputError: the folder has no probe.
    """
    try:
        tensors = load_tensors(folder / name)
        reference = tensors["reference"]
    except (InvalidInputError, KeyError) as error:
        raise InvalidInputError(f"{folder} has no usable {name}: export it again") from error
    inputs = {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}
    return Probe(inputs, reference, tensors.get("simulated"))
