"""Optimization profiles: which sizes a plan takes, and which it is tuned for.

One string describes them: `qdeploy.export.input_shapes`. All is checked before TensorRT is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.engines.tensorrt.graph import GraphTensor
from qdeploy.export.input_shapes import EXAMPLE, Profile, Range, Shape, describe, parse_shapes
from qdeploy.system.errors import InvalidInputError, UsageError

__all__ = [
    "Profile",
    "Range",
    "check_profiles",
    "choose_profile",
    "default_profile",
    "describe",
    "parse_shapes",
    "tuned_batch",
]


def default_profile(inputs: Sequence[GraphTensor], batch: int) -> dict[str, Range]:
    """From one sample to twice the batch, for guidance; tuned for the batch. Everything else must be fixed.

    Tight on purpose: activation memory is reserved for the largest shape. Larger batches run in parts.

    Raises:
        UsageError: an axis other than the first one has no fixed size.
    """
    profile = {}
    for port in (port for port in inputs if port.dynamic):
        rest = port.shape[1:]
        fixed = [size for size in rest if isinstance(size, int)]
        if len(fixed) < len(rest):
            raise UsageError(
                f"{port.name!r} has open sizes {list(port.shape)}: name them, as in --shapes {EXAMPLE}"
            )
        head = port.shape[0]
        first = (head, head, head) if isinstance(head, int) else (1, batch, 2 * batch)
        profile[port.name] = Range(*((size, *fixed) for size in first))
    return profile


def check_profiles(profiles: Sequence[Profile], inputs: Sequence[GraphTensor]) -> None:
    """Make sure that profiles fit a graph.

    Raises:
        UsageError: an input is unknown or missing, a shape does not fit, or least <= tuned <= largest fails.
    """
    ports = {port.name: port for port in inputs}
    for profile in profiles:
        for name in profile.keys() - ports.keys():
            raise UsageError(f"--shapes names {name!r}, but the graph takes {', '.join(ports)}")
        symbols: dict[tuple[str, int], tuple[int, str]] = {}
        for name, port in ports.items():
            if name not in profile:
                if port.dynamic:
                    raise UsageError(
                        f"--shapes says nothing of {name!r}, whose sizes {list(port.shape)} are open"
                    )
                continue
            for which, shape in enumerate((profile[name].least, profile[name].tuned, profile[name].largest)):
                _check_shape(port, shape)
                for size, wanted in zip(shape, port.shape, strict=True):
                    if isinstance(wanted, str):
                        known, other = symbols.setdefault((wanted, which), (size, name))
                        if known != size:
                            raise UsageError(
                                f"--shapes gives {wanted!r} as {known} in {other!r}, but as {size} in {name!r}"
                            )
            shapes = profile[name]
            for low, tuned, high in zip(shapes.least, shapes.tuned, shapes.largest, strict=True):
                if not low <= tuned <= high:
                    raise UsageError(
                        f"--shapes must ascend from MIN over OPT to MAX, {name}:{shapes} does not"
                    )


def _check_shape(port: GraphTensor, shape: Shape) -> None:
    fits = len(shape) == len(port.shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(shape, port.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"--shapes gives {port.name!r} the shape {'x'.join(map(str, shape))}, but the graph takes "
            f"{'x'.join(map(str, port.shape)) or 'a scalar'}"
        )


def add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Profile]) -> None:
    """Give TensorRT the profiles.

    Raises:
        InvalidInputError: it refuses one.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in inputs:
        if tensor.is_shape_tensor and -1 in tuple(tensor.shape):
            raise InvalidInputError(f"{tensor.name!r} holds sizes of other tensors: export with fixed shapes")
    for number, wanted in enumerate(profiles):
        native = builder.create_optimization_profile()
        for name, shapes in wanted.items():
            native.set_shape(name, shapes.least, shapes.tuned, shapes.largest)
        if config.add_optimization_profile(native) == -1:
            raise InvalidInputError(f"TensorRT refuses profile {number}: {describe([wanted])}")


def tuned_batch(profiles: Sequence[Profile]) -> int:
    """The size of the first axis that the first profile is tuned for; 1 without profiles."""
    sizes = (shapes.tuned[0] for profile in profiles for shapes in profile.values() if shapes.tuned)
    return next(sizes, 1)


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Number of the first profile that takes these shapes; None if none does."""
    for number, profile in enumerate(profiles):
        if all(profile[name].takes(shape) for name, shape in shapes.items() if name in profile):
            return number
    return None
