"""The probe: held-out inputs of a denoiser with their expected outputs, which travel with artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


PROBE = "probe.safetensors"


def read_probe(folder: Path) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The probe of a bundle or engine.

    Returns:
        The inputs, ``[rows, ...]`` each; the full-precision output; and that of the fake-quantized model,
        where there is one.

    Raises:
        InvalidInputError: the folder has no probe.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / PROBE)
        reference = tensors["reference"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InvalidInputError(f"{folder} has no usable {PROBE}: export it again") from error
    inputs = {name.removeprefix("input."): x for name, x in tensors.items() if name.startswith("input.")}
    return inputs, reference, tensors.get("simulated")
