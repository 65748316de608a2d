"""Files of tensors that others wrote with ``torch.save``: read as tensors and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from qdeploy.system.errors import InvalidInputError


def load_tensors(path: Path) -> Any:
    """What a file of PyTorch holds, mapped into memory. Code in it is never executed.

    Raises:
        InvalidInputError: it is not there, cannot be read, or holds more than tensors and containers of them.
    """
    import torch

    if not path.is_file():
        raise InvalidInputError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InvalidInputError(
            f"{path} holds more than tensors, such as code; it is refused, and nothing in it was executed"
        ) from error
    except Exception as error:
        if "mmap can only be used with files saved with" in str(error):
            raise InvalidInputError(
                f"{path} is a plain pickle, or of PyTorch's format before 1.6, and was not read: "
                "if you trust it, load it yourself and save its tensors with torch.save"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(f"{path} cannot be read as a PyTorch file: {reason}") from error
