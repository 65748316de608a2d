"""A verb in parts: a plan, parts that may be made anywhere, and a result that is assembled of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from qdeploy.parts.folder import PartFolder, check_alone, parts_of
from qdeploy.parts.plan import Job
from qdeploy.parts.run import HERE, made
from qdeploy.store.artifact import Artifact
from qdeploy.store.builder import Draft

Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=Artifact)


class VerbInParts(ABC, Generic[Result]):
    """One call of a verb, with all its inputs opened and checked."""

    @property
    @abstractmethod
    def output(self) -> Path:
        """Where the result goes."""

    @property
    @abstractmethod
    def place(self) -> Path:
        """The folder of the plan; it is known before the parts are, which may need the network."""

    @property
    @abstractmethod
    def job(self) -> Job:
        """The parts."""

    @abstractmethod
    def finished(self) -> Result | None:
        """The result of this very request, if it is there."""

    @abstractmethod
    def assemble(self, parts: PartFolder) -> Result:
        """The result of all parts."""

    def announce(self) -> None:
        """Say what will be done, or refuse it, before parts are made in this process."""

    def carry_out(self, on: str = HERE, workers: int | None = None, worker_cpus: float = 1.0) -> Result:
        """The result: found, or made where `qdeploy.parts.run.made` is told; the parts go afterwards.

        Raises:
            UsageError: another request for the same output is at work.
            Planned, CapabilityError: see `qdeploy.parts.run.made`.
        """
        if (done := self.finished()) is not None:
            PartFolder(self.place, "", 0, self.output).forget()
            return done
        check_alone(self.place, self.output)
        if on == HERE:
            self.announce()
        with made(self.job, on, workers, worker_cpus) as parts:
            result = self.assemble(parts)
            parts.done()
        return result


class ArtifactInParts(VerbInParts[Kind]):
    """One call of a verb whose result is an artifact.

    Attributes:
        draft: of the artifact.
    """

    draft: Draft[Kind]

    @property
    def output(self) -> Path:
        """Where the artifact goes."""
        return self.draft.output

    @property
    def place(self) -> Path:
        """The folder of the plan: a hidden sibling of the artifact."""
        return parts_of(self.draft.output, self.draft.request)

    def finished(self) -> Kind | None:
        """The artifact of this very request, if it is there."""
        return self.draft.finished()

    def assemble(self, parts: PartFolder) -> Kind:
        """The artifact of all parts."""
        with self.draft:
            if done := self.draft.finished():  # another process was faster
                return done
            return self.fill(parts)

    @abstractmethod
    def fill(self, parts: PartFolder) -> Kind:
        """Write the files of the artifact into its draft, and finish that."""
