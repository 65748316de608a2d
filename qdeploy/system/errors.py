"""Errors a user can act on. Each carries the exit code that the command line ends with."""

from __future__ import annotations

from pathlib import Path


class QDeployError(Exception):
    """Base of all expected errors: one sentence that says what is wrong, where, and what to do."""

    exit_code = 1


class UsageError(QDeployError):
    """The call itself makes no sense: an unknown name, an impossible number."""

    exit_code = 2


class CheckFailed(QDeployError):
    """A measured value missed its threshold."""

    exit_code = 3


class CapabilityError(QDeployError):
    """This machine, or this engine, lacks a required capability."""

    exit_code = 4


class InvalidInputError(QDeployError):
    """A model, recipe or artifact that cannot be used as it is."""

    exit_code = 5


class Planned(Exception):
    """What a verb ends with that was asked for its plan alone.

    Attributes:
        folder: of the plan.
        count: how many parts it has.
    """

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(f"{folder} is a plan of {count} parts")
        self.folder, self.count = folder, count
