"""TensorRT's data types by torch's names. ``trt.nptype`` fails for half of them."""

from __future__ import annotations

from typing import Any

from qdeploy.system.errors import CapabilityError

# Those that a tensor at the border of a network can have, by the name of the member of ``trt.DataType``.
TORCH_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}


def torch_name(dtype: Any, tensor: str) -> str:
    """Torch's name of a ``trt.DataType``.

    Args:
        dtype: the member.
        tensor: whose type it is, for the message.

    Raises:
        CapabilityError: torch has no such type.
    """
    name = str(dtype).rpartition(".")[2]
    if name not in TORCH_NAMES:
        raise CapabilityError(f"{tensor!r} is of TensorRT's type {name}, which torch tensors cannot hold")
    return TORCH_NAMES[name]
