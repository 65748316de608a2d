"""Names that are not known are refused whatever they are: a damaged file may hold anything in a name's place."""

from __future__ import annotations

import pytest

from qdeploy.system.suggest import unknown


def test_the_nearest_name_is_suggested() -> None:
    assert unknown("recipe", "w4a8-quset", ["w4a8-quest", "w8a8-tfmq"]).startswith(
        "unknown recipe 'w4a8-quset' (did you mean 'w4a8-quest'?): choose from"
    )


@pytest.mark.parametrize("given", [True, 10**20, None, ["int8"]])
def test_what_is_no_name_is_refused_like_one(given: object) -> None:
    assert unknown("number format", given, ["int8"]) == f"unknown number format {given!r}: choose from int8"  # type: ignore[arg-type]
