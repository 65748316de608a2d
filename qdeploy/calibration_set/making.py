"""What `qdeploy.calibration_set.collect` and `qdeploy.calibration_set.record` share on their way to a set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qdeploy.quant.time_ranges import read_ranges
from qdeploy.store.artifact import CalibrationFolder
from qdeploy.store.manifest import RANGES_PICTURE
from qdeploy.system.progress import say


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Leave torch's own generator as it was, and what is drawn from it meanwhile reproducible.

    Pipelines that do not pass their generators on to the scheduler draw from it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def ranges_name(number: int) -> str:
    """Name of the step that holds the ranges of a shard."""
    return f"ranges-{number:05d}"


def draw_ranges(made: CalibrationFolder) -> None:
    """The set's ranges as a picture in its folder.

    The picture is no part of the artifact: its bytes depend on the version of matplotlib and on fonts.
    """
    from qdeploy.plots.pictures import range_heat_map

    picture, ranges = made.path / RANGES_PICTURE, read_ranges(made)
    if ranges is None or picture.exists():
        return
    try:
        range_heat_map(ranges, picture)
    except OSError as error:
        say(f"{picture} could not be written: {error.strerror or error}")
