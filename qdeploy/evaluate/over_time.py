"""The error by timestep, compared with that of another artifact, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdeploy.evaluate.parity import RunnableArtifact, open_subject
from qdeploy.plots.pictures import ERROR_PICTURE, error_by_timestep, range_heat_map
from qdeploy.quant.time_ranges import read_ranges, tensor_names
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import explained_os_errors
from qdeploy.store.manifest import RANGES_PICTURE
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say
from qdeploy.system.tables import Table, number


def open_before(
    path: str | Path | Artifact, subject: RunnableArtifact, device: str = "cpu"
) -> RunnableArtifact:
    """What the subject is compared with: another checkpoint, bundle or engine of the same model.

    Raises:
        InvalidInputError: it is of another kind, damaged, or of another model.
        CapabilityError: its runtime is not installed.
    """
    before = open_subject(path, device)
    if before.artifact.facts.model_sha256 != subject.artifact.facts.model_sha256:
        raise InvalidInputError(
            f"{before.artifact.path} was made from another model than {subject.artifact.path}: there is no "
            "before and after to compare"
        )
    return before


def describe_before(before: RunnableArtifact, quality: Mapping[str, Any]) -> dict[str, Any]:
    """The entry ``before`` of a check's JSON object."""
    artifact = before.artifact
    named = {"path": str(artifact.path), "kind": artifact.kind, "sha256": artifact.sha256}
    return named | {"sqnr_db": quality["sqnr_db"]}


def timestep_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Both errors by timestep and the gain, as a table in text.

    Args:
        before: summary of SQNR, from `qdeploy.evaluate.metrics.sqnr.summary`.
        after: the same of the subject.
    """
    pairs = {t: (before["by_timestep"].get(t), value) for t, value in after["by_timestep"].items()}
    pairs["median"] = before["median"], after["median"]
    rows = [
        (t, number(one), number(other), number(None if one is None else other - one))
        for t, (one, other) in pairs.items()
    ]
    return Table(["SQNR at timestep, dB", "before", "after", "gain"], rows).text()


def draw(
    folder: Path,
    subjects: Sequence[RunnableArtifact],
    quality: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> list[Path]:
    """Draw ``ranges.png``, if there are ranges, and ``error.png``.

    Args:
        folder: an existing folder.
        subjects: the subject, and others whose ranges are used if it has none.
        quality: the subject's.
        before: from `describe_before`.

    Returns:
        The files.

    Raises:
        UsageError: a file cannot be written.
    """
    first = subjects[0].artifact.path
    found = (read_ranges(subject.artifact) for subject in subjects)
    ranges = next((ranges for ranges in found if ranges is not None and tensor_names(ranges)), None)
    summaries = {f"this: {first.name}": quality["sqnr_db"]}
    if before is not None:
        name = Path(before["path"]).name
        summaries = {f"before: {name}": before["sqnr_db"], f"after: {first.name}": quality["sqnr_db"]}
    series = {
        label: {float(t): value for t, value in summary["by_timestep"].items()}
        for label, summary in summaries.items()
    }
    with explained_os_errors(folder):
        drawn = [folder / ERROR_PICTURE]
        error_by_timestep(series, drawn[0])
        if ranges is None:
            say(f"{first} has no ranges over time, so {RANGES_PICTURE} is not drawn: name its --checkpoint")
        else:
            drawn.insert(0, folder / RANGES_PICTURE)
            range_heat_map(ranges, drawn[0])
    return drawn
