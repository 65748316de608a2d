"""Temporal features from a table: the time MLP and all embedding projections leave the graph.

What a network computes from the timestep alone is computed once for every timestep that will be used.
The graph then gathers rows by the timestep's value; nothing that led to them is left for the tracer to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.model.folder import Model
from qdeploy.model.schedulers import make_scheduler
from qdeploy.network.current_timestep import attach_current_timestep, midpoints
from qdeploy.network.roles import find_structure
from qdeploy.quant.feature_table import STORAGES, FeatureTable
from qdeploy.quant.layer import QuantizedLayer, quantized_layers, replace_module
from qdeploy.store.facts import TimestepFacts, TimeTableFacts
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown


@dataclass(frozen=True)
class TimeTable:
    """How temporal features are to be stored.

    Attributes:
        storage: ``fp32``, ``fp16``, ``int8``; or ``auto``: the codes of features that calibration has quantized, fp16
            where that holds a feature to 60 dB at every timestep, fp32 elsewhere.
        timesteps: [T] the rows, ascending.
        schedule: the words for the schedule that the rows belong to; None for all timesteps of training.
    """

    storage: str
    timesteps: Tensor
    schedule: str | None

    def facts(self, size: int) -> TimeTableFacts:
        """The facts of a bundle about its table; ``size`` in bytes."""
        rows = None if self.schedule is None else self.timesteps.tolist()
        return TimeTableFacts(storage=self.storage, schedule=self.schedule, rows=rows, bytes=size)


def plan_table(
    model: Model, storage: str, rows: str = "all", limits: TimestepFacts | None = None
) -> TimeTable:
    """Check a requested table, before any work.

    Args:
        model: the model, with its scheduler.
        storage: one of `STORAGES`.
        rows: ``all`` timesteps of training, or a schedule such as ``ddim:50``. Where the network is not called with
            whole numbers, ``all`` are those of its calibration set.
        limits: timesteps of the checkpoint.

    Raises:
        UsageError: the storage or the schedule is unknown, or the model does not state its timesteps.
    """
    if storage not in STORAGES:
        raise UsageError(unknown("storage of a time table", storage, ("none", *STORAGES)))
    span = None if limits is None else limits.range
    if rows == "all" and limits is not None and span is not None:
        return TimeTable(storage, torch.tensor(limits.calibrated).unique(), "its calibration set")
    if rows == "all":
        count = model.training_timesteps
        if count is None:
            raise UsageError(
                f"{model.path} has no scheduler that states the number of timesteps: name a schedule, such "
                "as --table-rows ddim:50"
            )
        return TimeTable(storage, torch.arange(count), None)
    name, _, steps = rows.rpartition(":")
    if not name or not steps.isdecimal() or int(steps) < 1:
        raise UsageError(f"the rows of a time table are 'all' or a schedule such as ddim:50, not {rows!r}")
    scheduler = make_scheduler(name, model.scheduler())
    try:
        scheduler.set_timesteps(int(steps))
    except ValueError as error:
        raise UsageError(f"a time table cannot have the rows of {rows}: {error}") from error
    timesteps = torch.as_tensor(scheduler.timesteps)
    if span is not None:
        if span.slope is None or span.offset is None:
            raise UsageError(
                f"a time table cannot have the rows of {rows}: how the network's timesteps follow from the "
                "scheduler's is not known; leave out --table-rows for those of the calibration set"
            )
        timesteps = (span.slope * timesteps.double() + span.offset).float()
    return TimeTable(storage, timesteps.unique(), rows)


def tabulate(denoiser: nn.Module, inputs: Mapping[str, Tensor], table: TimeTable) -> int:
    """Replace a network's temporal features by a table.

    Features that calibration stored as quantized tables keep their very codes.

    Args:
        denoiser: the network, quantized or not; changed in place.
        inputs: one row or more of its inputs, to find out what depends on the timestep alone.
        table: what to store.

    Returns:
        Bytes that the table takes.

    Raises:
        UsageError: nothing depends on the timestep alone, float16 cannot hold the features, or the network has
            none at one of the timesteps.
    """
    time = find_structure(denoiser, inputs).time
    if not time.features:
        raise UsageError("nothing in this network depends on the timestep alone: export without a time table")
    current = attach_current_timestep(denoiser)
    timesteps = table.timesteps
    with torch.no_grad():
        features = time(denoiser, timesteps)
    _check_finite(features, timesteps)
    edges = midpoints(timesteps.float())
    size = 0
    for name, values in features.items():
        layer = denoiser.get_submodule(name)
        kept = layer.table if isinstance(layer, QuantizedLayer) else None
        if kept is not None and table.storage in ("int8", "auto"):
            with current.at(timesteps):
                rows = current.index(kept.edges)
            assert kept.scale is not None
            assert kept.zero_point is not None
            made = FeatureTable(kept.rows[rows], edges, current, kept.scale[rows], kept.zero_point[rows])
        else:
            made = FeatureTable.stored(values, edges, current, table.storage)
        replace_module(denoiser, name, made)
        size += made.size
    for path in time.layers:
        layer = denoiser.get_submodule(path)
        if isinstance(layer, QuantizedLayer):  # nothing reads it any more, so the graph will be without it
            layer.input_quantizers = nn.ModuleList()
    return size


def _check_finite(features: Mapping[str, Tensor], timesteps: Tensor) -> None:
    for values in features.values():
        broken = ~values.flatten(1).isfinite().all(1)
        if broken.any():
            raise UsageError(
                f"at timestep {float(timesteps[broken][0]):g} the network's own temporal features are NaN or "
                "Inf: choose rows that it is called with, such as --table-rows ddim:50"
            )


def needs_table(denoiser: nn.Module) -> bool:
    """Whether a network holds what only a table can represent: a zero point that moves with the timestep."""
    return any(
        quantizer.banked and not quantizer.hoisted
        for layer in quantized_layers(denoiser).values()
        for quantizer in layer.input_quantizers
    )
