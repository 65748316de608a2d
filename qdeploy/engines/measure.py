"""Measurements of an engine: its latency, its kernels, and its distance from the calibrated network."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qdeploy.engines.int8_share import int8_mac_share
from qdeploy.store.measured import DistanceMeasured, LatencyMeasured, SizeMeasured
from qdeploy.store.probe import read_probe
from qdeploy.store.sizes import size_probe, sizes_to_prove
from qdeploy.system.decibels import distance

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.base import Engine


def repeat_rows(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The first rows of a probe, repeated to a batch, all at the first row's timestep."""
    import torch

    repeated = {name: x[torch.arange(batch) % len(x)] for name, x in inputs.items()}
    if "timestep" in repeated:
        repeated["timestep"] = inputs["timestep"].flatten()[0]
    return repeated


def row_by_row(engine: Engine, inputs: Mapping[str, Tensor]) -> Tensor:
    """The engine's output for every row of a probe, one call each, so that one shape serves them all."""
    import torch

    return torch.cat([engine(row) for row in single_rows(inputs)])


def single_rows(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a probe as inputs of one call each."""
    rows = len(next(iter(inputs.values())))
    return [{name: x[row : row + 1] for name, x in inputs.items()} for row in range(rows)]


def latency(
    engine: Engine, inputs: Mapping[str, Tensor], seconds: float = 2.0, least: int = 5
) -> LatencyMeasured:
    """Median and 95th percentile of a call, in milliseconds.

    Args:
        engine: the engine; its first two calls are not counted.
        inputs: inputs of a call.
        seconds: about how long to measure.
        least: how many calls to measure at least.
    """
    for _ in range(2):
        engine(inputs)
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < least or (time.perf_counter() < end and len(took) < 200):
        took.append(engine.timed(inputs))
    took.sort()
    rank = math.ceil(0.95 * len(took)) - 1
    return LatencyMeasured(median=round(median(took), 3), p95=round(took[rank], 3))


def int8_shares(engine: Engine, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """`int8_mac_share` of an engine, from the kernels that it executes for these inputs."""
    macs, meant = read_macs(engine.path)
    return int8_mac_share(engine.kernels(inputs), macs, meant)


def read_macs(folder: Path) -> tuple[dict[str, int], set[str]]:
    """MACs of one sample by node, and the nodes meant to run in int8, of an engine's folder."""
    described: dict[str, Any] = json.loads((folder / "macs.json").read_text())
    return described["macs"], set(described["meant_int8"])


def measure_sizes(engine: Engine, folder: Path) -> dict[str, SizeMeasured]:
    """Parity and latency of one row at every size that a bundle has a probe of.

    Args:
        engine: takes all of them.
        folder: of the engine, or what becomes it.

    Returns:
        For each height and width in latent pixels, such as ``64x96``, its parity to the network that was exported
        and its latency; nothing where the engine has one size.
    """
    found: dict[str, SizeMeasured] = {}
    sizes = engine.spec.sizes
    for height, width in sizes_to_prove(sizes) if sizes else ():
        inputs, reference, simulated = read_probe(folder, size_probe(height, width))
        parity = distance(row_by_row(engine, inputs), reference if simulated is None else simulated)
        found[f"{height}x{width}"] = SizeMeasured(
            parity=DistanceMeasured(**parity), ms=latency(engine, repeat_rows(inputs, 1), seconds=0.5)
        )
    return found
