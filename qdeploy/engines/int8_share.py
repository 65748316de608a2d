"""Which share of a graph's multiplications an engine really computes in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdeploy.engines.base import Kernel


def int8_mac_share(
    kernels: Sequence[Kernel], macs: Mapping[str, int], meant: set[str] | frozenset[str]
) -> dict[str, float]:
    """Share of the multiplications that ran in int8, from the kernels that the runtime reports.

    Args:
        kernels: what was executed.
        macs: MACs by node, from `graph_macs`.
        meant: the nodes that were quantized to run in int8, from `meant_int8`.

    Returns:
        ``int8_mac_share`` of all MACs and ``int8_mac_share_of_meant`` of those of the nodes in ``meant``;
        the latter is 1 where there are none.
    """
    ran = int8_layers(kernels)
    total, wanted = sum(macs.values()), sum(macs[name] for name in meant if name in macs)
    share = sum(count for name, count in macs.items() if name in ran) / total if total else 0.0
    kept = sum(count for name, count in macs.items() if name in ran and name in meant)
    return {
        "int8_mac_share": round(share, 4),
        "int8_mac_share_of_meant": round(kept / wanted, 4) if wanted else 1.0,
    }


def int8_layers(kernels: Sequence[Kernel]) -> set[str]:
    """Names of the graph's nodes that multiplied in int8."""
    ran = (kernel for kernel in kernels if multiplies(kernel) and kernel.precision == "int8")
    return {layer for kernel in ran for layer in kernel.layers}


def multiplies(kernel: Kernel) -> bool:
    """Whether a kernel multiplies matrices; others move int8 data without saving a multiplication."""
    words = ("conv", "correlation", "matmul", "fullyconnected", "gemm", "attention", "mha")
    return any(word in kernel.kind.lower() for word in words)
