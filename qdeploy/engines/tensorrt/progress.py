"""TensorRT's progress on our progress bar."""

from __future__ import annotations

import sys
from typing import Any

from qdeploy.system.progress import verbosity


def make_monitor(trt: Any) -> Any:
    """A progress monitor, or None where nobody watches or this version has none."""
    if verbosity.level < 1 or not sys.stderr.isatty() or not hasattr(trt, "IProgressMonitor"):
        return None
    return monitor_class(trt)()


def monitor_class(trt: Any) -> Any:
    """A class of monitors that show a bar for each phase; TensorRT calls them from its own threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            from rich.console import Console
            from rich.progress import Progress

            self.stopped = False
            self.tasks: dict[str, Any] = {}
            self.bars = Progress(console=Console(stderr=True), transient=True)
            self.bars.start()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            inner = "  " if parent_phase in self.tasks else ""
            self.tasks[phase_name] = self.bars.add_task(inner + phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Whether to go on; False ends the build."""
            if phase_name in self.tasks:
                self.bars.update(self.tasks[phase_name], completed=step + 1)
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            if (task := self.tasks.pop(phase_name, None)) is not None:
                self.bars.remove_task(task)

        def close(self) -> None:
            self.bars.stop()

    return Monitor
