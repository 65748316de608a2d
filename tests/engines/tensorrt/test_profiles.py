from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.engines.tensorrt.graph import GraphTensor
from qdeploy.engines.tensorrt.profiles import (
    Range,
    check_profiles,
    choose_profile,
    default_profile,
    describe,
    parse_shapes,
)
from qdeploy.system.errors import UsageError

INPUTS = (
    GraphTensor("sample", "float32", ("batch", 4, 64, 64)),
    GraphTensor("timestep", "float32", ()),
    GraphTensor("encoder_hidden_states", "float32", ("batch", 77, 768)),
)
GOOD = "sample:1x4x64x64,2x4x64x64,8x4x64x64;encoder_hidden_states:1x77x768,2x77x768,8x77x768"

shapes = st.lists(st.integers(1, 99), min_size=1, max_size=5).map(tuple)
profiles = st.dictionaries(
    st.from_regex(r"[a-z_.]+:?[a-z0-9_]+", fullmatch=True),
    st.builds(Range, shapes, shapes, shapes),
    min_size=1,
)


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(profiles, min_size=1, max_size=3))
def test_what_is_described_is_read_back(several: list[dict[str, Range]]) -> None:
    assert parse_shapes(describe(several)) == several


def test_one_shape_stands_for_three() -> None:
    assert parse_shapes("x:2x3")[0]["x"] == Range((2, 3), (2, 3), (2, 3))


@pytest.mark.parametrize(
    "text", ["", "sample", "sample:", "sample:1x,2,3", "x:1,2", "x:1;x:2", "x:1|", ":1x2", "x:1xa"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shapes") as error:
        parse_shapes(text)
    assert error.value.exit_code == 2


def test_a_good_description_fits() -> None:
    check_profiles(parse_shapes(GOOD), INPUTS)
    check_profiles([default_profile(INPUTS, 4)], INPUTS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sample:", "latents:", "names 'latents', but the graph takes sample"),
        (";encoder_hidden_states:1x77x768,2x77x768,8x77x768", "", "nothing of 'encoder_hidden_states'"),
        ("1x4x64x64", "1x3x64x64", "takes batchx4x64x64"),
        ("1x4x64x64", "1x4x64", "1x4x64, but"),
        ("1x4x64x64", "0x4x64x64", "0x4x64x64"),
        ("8x4x64x64", "6x4x64x64", "'batch' as 6 in 'sample', but as 8"),
        ("1x4x64x64,2x4x64x64,8x4x64x64", "4x4x64x64,2x4x64x64,8x4x64x64", "ascend"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_profiles(parse_shapes(GOOD.replace(old, new, 1)), INPUTS)


def test_sizes_must_ascend() -> None:
    with pytest.raises(UsageError, match="ascend"):
        check_profiles(parse_shapes("sample:4x4x64x64,2x4x64x64,8x4x64x64"), INPUTS[:2])


def test_the_default_is_tight_and_tuned_for_the_batch() -> None:
    profile = default_profile(INPUTS, 4)
    assert profile.keys() == {"sample", "encoder_hidden_states"}
    assert profile["sample"] == Range((1, 4, 64, 64), (4, 4, 64, 64), (8, 4, 64, 64))
    assert default_profile(INPUTS[1:2], 4) == {}


def test_open_sizes_other_than_the_batch_need_words() -> None:
    with pytest.raises(UsageError, match=r"height.*--shapes"):
        default_profile([GraphTensor("sample", "float32", ("batch", 4, "height", 64))], 1)


def test_the_first_profile_that_fits_is_chosen() -> None:
    several = parse_shapes("x:1x2,2x2,4x2|x:1x2,8x2,9x2")
    assert choose_profile(several, {"x": (3, 2)}) == 0
    assert choose_profile(several, {"x": (9, 2)}) == 1
    assert choose_profile(several, {"x": (10, 2)}) is None
    assert choose_profile(several, {"x": (3, 3)}) is None
    assert choose_profile(several, {"x": (3, 2), "other": (7,)}) == 0
