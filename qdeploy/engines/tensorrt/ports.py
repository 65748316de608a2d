"""Inputs and outputs of an engine, as TensorRT reports them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdeploy.engines.tensorrt.dtypes import torch_name
from qdeploy.system.errors import CapabilityError


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine."""

    name: str
    is_input: bool
    dtype: str
    host: bool
    shape: tuple[int, ...]


def read_ports(trt: Any, engine: Any) -> dict[str, EngineTensor]:
    """Inputs and outputs of an engine by name.

    Raises:
        CapabilityError: one is of a type that torch lacks.
    """
    ports = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        ports[name] = EngineTensor(
            name,
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            torch_name(engine.get_tensor_dtype(name), name),
            engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            tuple(engine.get_tensor_shape(name)),
        )
    if not ports:
        raise CapabilityError("the plan has neither inputs nor outputs")
    return ports
