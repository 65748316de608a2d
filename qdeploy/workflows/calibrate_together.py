"""One calibration by several processes, as torchrun starts them: each step's rows are shared, and gradients added up.

All processes do the same stages at the same time. The first one keeps the journal and writes the checkpoint; the
others begin with a copy of that journal, so that all of them go on at the same step after a stop.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.session import Session
from qdeploy.recipe.effort import find_effort
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Checkpoint, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.system.errors import UsageError
from qdeploy.system.processes import is_main_process, of_the_first, process_count, process_rank


def check_shareable(recipe: Recipe) -> None:
    """Refuse a calibration that several processes cannot share, before any work.

    Raises:
        UsageError: there is one process, no stage learns by gradients, or a step has fewer rows than processes.
    """
    count, effort = process_count(), find_effort(recipe.effort)
    if count < 2:
        raise UsageError(
            "--data-parallel shares the work of processes that torchrun starts: "
            "torchrun --nproc_per_node 2 -m qdeploy.cli calibrate ... --data-parallel"
        )
    if not any(stage.cost(1, effort)[1] for stage in recipe.stages):
        raise UsageError(
            "no stage of the recipe learns by gradients, which --data-parallel shares: leave it out"
        )
    if effort.batch < count:
        raise UsageError(f"a step has {effort.batch} rows, too few for {count} processes")


def own_draft(draft: Draft[Checkpoint]) -> Draft[Checkpoint]:
    """The draft that this process works in: of the first one the artifact's, of others a hidden sibling."""
    if is_main_process():
        return draft
    return replace(draft, output=draft.output.with_name(f".{draft.output.name}.process-{process_rank()}"))


def run_together(session: Session, first: Draft[Checkpoint], write: Callable[[], Checkpoint]) -> Checkpoint:
    """Run the stages in all processes, and write the checkpoint in the first.

    Args:
        session: of this process; its draft is `own_draft`.
        first: the draft of the first process.
        write: makes the checkpoint of the session.
    """
    own = session.draft
    if is_main_process():
        with own:
            for _ in ("it has been cleaned", "it has been copied"):
                of_the_first(None)
            run_stages(session)
            made = write()
        of_the_first(None)
        return made
    of_the_first(None)
    shutil.rmtree(own.work, ignore_errors=True)
    shutil.copytree(first.work, own.work, ignore=shutil.ignore_patterns("lock", "scratch*"))
    of_the_first(None)
    try:
        with own:
            run_stages(session)
    finally:
        shutil.rmtree(own.work, ignore_errors=True)
    of_the_first(None)
    return open_artifact(first.output, Checkpoint)
