"""From unit to unit: what each is given by the units before it, and what it should return."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

from qdeploy.calibrate.finished_units import FinishedUnits
from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.calibrate.record_units import UnitRecorder, UnitRun
from qdeploy.calibrate.session import Session
from qdeploy.network.current_timestep import current_timestep_of

# That share the memory: a unit's inputs and targets, and what units before it computed in two modes.
RECORDINGS = 4


class UnitWalk:
    """One walk over the units of a network, in the order of execution.

    Once a unit is asked for, those before it are done: they have to stay as they are as long as the walk goes on.

    Args:
        session: the calibration.
        student: the mode of the network in which units get their inputs; the present one by default.
        rows: how many of the effort's rows it looks at, at most; None for all.
        half: record in float16.

    Attributes:
        rows: their numbers in the calibration set.
    """

    def __init__(
        self,
        session: Session,
        student: Callable[[], AbstractContextManager[None]] = nullcontext,
        rows: int | None = None,
        *,
        half: bool = False,
    ) -> None:
        self.session, self.half = session, half
        self.modes = {"student": student, "teacher": session.teacher}
        self.rows = session.rows(rows)
        self.timesteps = session.data.timesteps[self.rows].flatten()

    def problem(self, unit: str) -> UnitProblem:
        """The reconstruction problem of a unit: the student's inputs, and what the teacher returns."""
        with self.modes["teacher"]():
            targets = self._recorders["teacher"].outputs(unit)
        learn, judge = self.session.split(self.rows)
        return UnitProblem(self.run(unit), targets, learn, judge)

    def run(self, unit: str, mode: str = "student") -> UnitRun:
        """A unit with the inputs that it gets in a mode of the network, to be run on the walk's rows."""
        session = self.session
        with self.modes[mode]():
            inputs = self._recorders[mode].inputs(unit)
        current = current_timestep_of(session.denoiser)
        module = session.denoiser.get_submodule(unit)
        return UnitRun(module, inputs, session.device, current, self.timesteps)

    @cached_property
    def _recorders(self) -> dict[str, UnitRecorder]:
        session, scratch = self.session, self.session.draft.work / "scratch"
        budget, readers = session.max_memory // RECORDINGS, session.readers
        once = {unit: session.denoiser.get_submodule(unit) for unit in readers}

        def recorder() -> UnitRecorder:
            finished = FinishedUnits(
                once, readers, len(self.rows), scratch, budget, session.device, half=self.half
            )
            return UnitRecorder(
                session.denoiser,
                session.inputs,
                self.rows,
                session.batch,
                scratch,
                budget,
                finished,
                half=self.half,
            )

        return {mode: recorder() for mode in self.modes}
