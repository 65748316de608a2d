"""The share of multiplications that ran in int8."""

from __future__ import annotations

from qdeploy.engines.base import Kernel
from qdeploy.engines.int8_share import int8_mac_share


def test_the_share_counts_what_ran_and_not_what_was_written() -> None:
    macs = {"a": 60, "b": 30, "c": 10}
    kernels = [
        Kernel("1", ("a", "relu"), "Convolution", "int8", "brgconv_avx512_I8"),
        Kernel("2", ("b",), "Convolution", "f32", "brgconv_avx512_f32"),
        Kernel("3", ("b", "c"), "Reorder", "int8", "jit_uni_I8"),
    ]
    assert int8_mac_share(kernels, macs, {"a", "b"}) == {
        "int8_mac_share": 0.6,
        "int8_mac_share_of_meant": 0.6667,
    }
    assert int8_mac_share(kernels, macs, set())["int8_mac_share_of_meant"] == 1.0
