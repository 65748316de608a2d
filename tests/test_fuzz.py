"""No input ends in an internal error: what is not accepted is refused in one sentence. `make fuzz` runs thousands."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.fuzzing import Subjects, outcome

COUNT = 150  # seeds that are the same at every run
PARTS = 5


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("subjects"))


@pytest.mark.slow
@pytest.mark.field
@pytest.mark.parametrize("part", range(PARTS))
def test_every_input_is_accepted_or_refused(subjects: Subjects, part: int) -> None:
    wrong = []
    for seed in range(part, COUNT, PARTS):
        with tempfile.TemporaryDirectory() as work:
            kind, found, why = outcome(seed, subjects, Path(work))
        if found not in ("accepted", "refused"):
            wrong.append(f"{kind}: {why}")
    assert not wrong
