"""One pass over the calibration rows in which some modules are observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdeploy.model.inputs import denoise
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.system.progress import track

if TYPE_CHECKING:
    from qdeploy.calibrate.session import Session


def observe_rows(
    session: Session,
    modules: Mapping[str, nn.Module],
    what: str,
    *,
    before: Callable[[ModuleCall], None] | None = None,
    after: Callable[[ModuleCall], Any] | None = None,
    mode: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Run the network on all calibration rows, batch by batch, without gradients.

    While a call runs, `qdeploy.network.current_timestep` knows the timestep of each of its rows.

    Args:
        session: the calibration.
        modules: what is observed, by name.
        what: for the progress bar.
        before: called before each call of a module.
        after: called after each call of a module.
        mode: of the network, such as ``session.teacher``; its present one by default.
    """
    rows, batch = session.rows(), session.batch
    with torch.no_grad(), mode(), observing(modules, before, after):
        for start in track(range(0, len(rows), batch), what):
            denoise(session.denoiser, session.inputs(rows[start : start + batch]))
