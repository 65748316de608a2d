"""No input ends in an internal error: what is not accepted is refused in one sentence. `make fuzz` runs thousands."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import Subjects, outcome


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("subjects"))


@pytest.mark.slow
@pytest.mark.field
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(seed=st.integers(0, 2**32))
def test_every_input_is_accepted_or_refused(subjects: Subjects, seed: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        _, found, wrong = outcome(seed, subjects, Path(work))
    assert found in ("accepted", "refused"), wrong
