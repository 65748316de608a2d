"""A pattern of layers that excludes nothing, or everything, is refused with what was probably meant."""

from __future__ import annotations

import re

import pytest

from qdeploy.recipe.exclusions import check_exclude
from qdeploy.system.errors import UsageError

LAYERS = [
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.conv2",
    "mid_block.to_q",
    "conv_out",
]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("down_block.*", "did you mean 'down_blocks.*'"),
        ("conv_inn", "did you mean 'conv_in'"),
        ("mid_block", r"did you mean 'mid_block\.\*'"),
        ("mid_block.", r"did you mean 'mid_block\.\*'"),
        ("to_q", r"did you mean '\*to_q'"),
        ("conv_in,conv_out", "one pattern at a time, --exclude 'conv_in' --exclude 'conv_out'"),
        ("conv_in, conv_out", "--exclude 'conv_in' --exclude 'conv_out'"),
        (r"^down_blocks\.0\..*$", r"not regular expressions, so write 'down_blocks\.0\.\*'"),
        (r".*\.conv1", r"not regular expressions, so write '\*\.conv1'"),
        ("zzz", "layers have names such as 'conv_in'"),
        ("", "matches no layer"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_what_was_meant(pattern: str, meant: str) -> None:
    with pytest.raises(UsageError, match="matches no layer") as refused:
        check_exclude([pattern], LAYERS, LAYERS)
    assert re.search(meant, str(refused.value))


def test_one_wrong_pattern_among_good_ones_is_refused() -> None:
    with pytest.raises(UsageError, match="'conv_up' matches no layer"):
        check_exclude(["conv_in", "conv_up"], LAYERS, LAYERS)


@pytest.mark.parametrize("patterns", [["*"], ["conv_*", "down*", "mid*"]])
def test_patterns_that_match_everything_are_refused(patterns: list[str]) -> None:
    with pytest.raises(UsageError, match="nothing would be quantized"):
        check_exclude(patterns, LAYERS, LAYERS)


def test_a_layer_that_stays_in_float_anyway_may_be_excluded() -> None:
    check_exclude(["conv_in"], LAYERS, LAYERS[1:])
