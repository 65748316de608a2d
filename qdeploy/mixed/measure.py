"""The exact pass: one layer quantized alone, and the error that the prediction then has."""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.calibrate.session import Session
from qdeploy.mixed.options import LayerOptions
from qdeploy.mixed.rows import TimestepRows, row_powers
from qdeploy.model.inputs import denoise


class Exact:
    """Measures layers against the full-precision predictions, which are computed once.

    Args:
        session: the network, its quantizers set.
        rows: what to measure on.
    """

    def __init__(self, session: Session, rows: TimestepRows) -> None:
        self.session, self.rows = session, rows
        starts = range(0, len(rows.numbers), session.effort.batch)
        self._parts = [slice(start, start + session.effort.batch) for start in starts]
        with session.teacher(), torch.no_grad():
            self._expected = [self._predict(part) for part in self._parts]
        self.signal = rows.by_timestep(torch.cat([row_powers(part) for part in self._expected]))

    def _predict(self, part: slice) -> Tensor:
        return denoise(self.session.denoiser, self.session.inputs(self.rows.numbers[part])).cpu()

    def noise(self, subject: LayerOptions) -> Tensor:
        """[options, T] noise by signal at each timestep, for each of a layer's options."""
        measured = []
        with self.session.teacher(), torch.no_grad():
            for option in subject.options():
                with subject.trying(option):
                    made = zip(self._parts, self._expected, strict=True)
                    noise = [row_powers(self._predict(part) - expected) for part, expected in made]
                measured.append(self.rows.by_timestep(torch.cat(noise)) / self.signal)
        return torch.stack(measured)
