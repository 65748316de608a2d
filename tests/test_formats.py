"""Number formats: codes fit their bits, and names lead to formats."""

from __future__ import annotations

import pytest

from qdeploy.errors import UsageError
from qdeploy.formats import FORMATS, Format, integer, parse_format, unsigned
from qdeploy.targets import TARGETS

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


@pytest.mark.parametrize("name", ["int3", "INT8", "", "fp4", "int4b32"])
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
