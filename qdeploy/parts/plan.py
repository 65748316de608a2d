"""Plans: what a verb does in parts, written down so that any process can make any part.

A plan is a call of a verb's function: its arguments as JSON, the hash of all that determines the result, and the
number of parts. A worker opens the same inputs from it, and refuses if they hash to anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qdeploy.model.folder import Model
from qdeploy.model.sampling import Sampling
from qdeploy.parts.folder import PLAN, PartFolder
from qdeploy.store.artifact import Artifact
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.files import explained_os_errors, write_json
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.version import __version__

# The verbs that work in parts: module and function. Each module also has a function ``job`` of the same arguments.
VERBS = {
    "collect": ("qdeploy.calibration_set.collect", "collect"),
    "sample": ("qdeploy.sampling.sample", "sample"),
    "sensitivity": ("qdeploy.mixed.sensitivity", "sensitivity"),
    "check": ("qdeploy.evaluate.check", "check"),
    "sweep": ("qdeploy.workflows.sweep", "sweep"),
}


@dataclass
class Job:
    """A verb's work in parts.

    Attributes:
        verb: its name.
        folder: of the plan.
        request: hash of all that determines the parts.
        count: how many parts there are.
        output: what the work is for, in messages.
        arguments: of the verb's function, in JSON's types; None where other processes cannot open them, as
            models in memory.
        make: fills a folder with the files of a part, by its number; pure.
        device: torch device that makes them.
        label: of the progress bar.
        shows_progress: whether `make` itself does.
    """

    verb: str
    folder: Path
    request: str
    count: int
    output: Path | str
    arguments: Mapping[str, Any] | None
    make: Callable[[int, Path], None]
    device: str = "cpu"
    label: str = "parts"
    shows_progress: bool = False

    def parts(self) -> PartFolder:
        """Its finished parts."""
        return PartFolder(self.folder, self.request, self.count, self.output, self.arguments is not None)

    def write(self) -> Path:
        """Write the plan.

        Returns:
            Its folder.

        Raises:
            UsageError: the arguments are objects in memory, or the system refuses to write.
        """
        file = self.folder / PLAN
        if not file.is_file():
            with explained_os_errors(file):
                write_json(file, self.plan())
        return self.folder

    def plan(self) -> dict[str, Any]:
        """The plan, as it is written.

        Raises:
            UsageError: the arguments are objects in memory.
        """
        if self.arguments is None:
            raise UsageError(
                f"other processes cannot open what {self.verb} was given: save the model to a folder and name that"
            )
        return {
            "verb": self.verb,
            "version": __version__,
            "request": self.request,
            "count": self.count,
            "arguments": dict(self.arguments),
        }


def named(source: Any) -> str | None:
    """What other processes open an input or output by; None for an object in memory."""
    if isinstance(source, Artifact):
        return str(source.path.resolve())
    if isinstance(source, Model):
        return str(source.path.resolve())
    if isinstance(source, Path):
        return str(source.resolve())
    if isinstance(source, str):
        return str(Path(source).resolve()) if Path(source).exists() else source
    return None


def find_plan(path: str | Path) -> Path:
    """The folder of a plan, by its own path or by that of the artifact that it is for.

    Raises:
        InvalidInputError: there is none, or there are several.
    """
    given = Path(path)
    if (given / PLAN).is_file():
        return given
    found = [file.parent for file in given.parent.glob(f".{given.name}.parts/*/{PLAN}")]
    if len(found) == 1:
        return found[0]
    what = (
        "is no plan: name the folder that `--on plan` printed" if not found else "has several plans: name one"
    )
    raise InvalidInputError(f"{path} {what}")


def read_plan(folder: Path) -> Mapping[str, Any]:
    """A plan as it was written.

    Raises:
        InvalidInputError: it is damaged, or another version of qdeploy wrote it.
    """
    plan = read_json_object(folder / PLAN)
    if plan.get("verb") not in VERBS or not isinstance(plan.get("arguments"), dict):
        raise InvalidInputError(f"{folder / PLAN} is no plan of qdeploy")
    if plan.get("version") != __version__:
        raise InvalidInputError(
            f"{folder} was planned by qdeploy {plan.get('version')}, and this is {__version__}: "
            "use one version on all machines"
        )
    return plan


def open_job(folder: Path, own_place: bool = False) -> Job:
    """The work of a plan, with its inputs opened in this process.

    Args:
        folder: of the plan.
        own_place: parts belong where the verb looks for them on this machine, wherever the plan is.

    Raises:
        InvalidInputError: the plan is damaged, of another version, or the inputs here are not those that were
            planned with.
    """
    plan = read_plan(folder)
    module, _ = VERBS[plan["verb"]]
    job: Job = import_module(module).job(**_opened(plan["arguments"]))
    if job.request != plan.get("request") or job.count != plan.get("count"):
        raise InvalidInputError(
            f"the model or its inputs are not those of the plan {folder}: copy the same ones to all machines"
        )
    job.folder = job.folder if own_place else folder
    job.arguments = plan["arguments"]
    return job


def call(folder: Path) -> Any:
    """Carry out the verb of a plan: what parts are missing is made first."""
    plan = read_plan(folder)
    module, function = VERBS[plan["verb"]]
    return getattr(import_module(module), function)(**_opened(plan["arguments"]))


def _opened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the verb's function takes them."""
    opened = dict(arguments)
    if "sampling" in opened:
        opened["sampling"] = Sampling(**opened["sampling"])
    return opened
