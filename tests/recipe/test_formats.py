"""Number formats: codes fit their bits, and names lead to formats."""

from __future__ import annotations

import pytest

from qdeploy.recipe.formats import (
    BLOCKS,
    FORMATS,
    Format,
    fp8,
    int4b32,
    int4b64,
    int4b128,
    int8,
    int8_dynamic,
    int8b32,
    int8b64,
    integer,
    parse_format,
    unsigned,
)
from qdeploy.recipe.targets import TARGETS
from qdeploy.system.errors import UsageError

INTEGERS = [number_format for number_format in FORMATS.values() if not number_format.floating]


@pytest.mark.parametrize("number_format", INTEGERS, ids=str)
def test_a_format_has_as_many_codes_as_its_bits_allow(number_format: Format) -> None:
    assert number_format.qmax - number_format.qmin + 1 == 2**number_format.bits


@pytest.mark.parametrize("bits", range(2, 17))
def test_zero_is_a_code_and_only_symmetric_formats_are_signed(bits: int) -> None:
    signed, positive = integer(bits), unsigned(bits)
    assert signed.qmin == -signed.qmax - 1
    assert positive.qmin == 0
    assert signed.qmin < 0 < signed.qmax


def test_every_name_leads_to_the_format_of_that_name() -> None:
    assert {name: parse_format(name) for name in FORMATS} == FORMATS
    assert all(name == number_format.name for name, number_format in FORMATS.items())


def test_none_leaves_tensors_as_they_are() -> None:
    assert parse_format("none") is None


@pytest.mark.parametrize("name", ["int2", "INT8", "", "fp4", "int4b16"])
def test_an_unknown_name_is_refused_with_the_names_that_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=r"int8, uint8, .*none"):
        parse_format(name)


def test_targets_name_only_formats_that_exist() -> None:
    """A four-bit weight runs on an int8 kernel bit for bit, an eight-bit one with a zero point does not."""
    for target in TARGETS.values():
        for name in target.weights | target.activations:
            parse_format(name)
        if target.backends:
            kernels = [FORMATS[name] for name in target.weights - {"none", "fp8"}]
            assert all(max(-f.qmin, f.qmax, 0 if f.symmetric else f.qmax) <= 128 for f in kernels)


@pytest.mark.parametrize(
    ("number_format", "features", "fitting"),
    [
        (int4b128, 256, int4b128),
        (int4b128, 320, int4b64),
        (int4b64, 256, int4b64),
        (int4b128, 96, int4b32),
        (int8b64, 96, int8b32),
        (int4b32, 80, None),
        (int8, 3, int8),
        (fp8, 3, fp8),
    ],
)
def test_a_block_that_does_not_divide_gives_way_to_a_smaller_one(
    number_format: Format, features: int, fitting: Format | None
) -> None:
    assert number_format.fitting(features) == fitting


def test_blocks_for_tensorrt_have_the_sizes_that_lint_knows_kernels_for() -> None:
    from qdeploy.export.lint.rules.weights import INT4_BLOCKS

    able = {FORMATS[name].block for name in TARGETS["tensorrt"].weights - {"none", "nvfp4"}}
    assert able == {0, *INT4_BLOCKS}
    assert {f.block for f in FORMATS.values() if f.name != "nvfp4"} == {0, *BLOCKS}


def test_the_float_format_is_symmetric_and_as_wide_as_torch_says() -> None:
    import torch

    assert fp8.floating
    assert not int8.floating
    assert (fp8.qmin, fp8.qmax) == (-448, 448) == (-int(torch.finfo(torch.float8_e4m3fn).max), fp8.qmax)
    assert [f.short for f in (int8, fp8, int4b128, int8_dynamic)] == ["8", "f8", "4g128", "8d"]
