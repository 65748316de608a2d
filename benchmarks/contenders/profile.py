"""Where OpenVINO spends its time: by kernel type, as its own counters tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.contenders import Case, Loaded
from benchmarks.contenders.openvino_float import compile_ir
from qdeploy.engines.int8_share import int8_mac_share
from qdeploy.engines.openvino import kernel_of
from qdeploy.export.macs import graph_macs

RUNS = 12
# What the table calls them, by the runtime's word for the kernel.
GROUPS = {
    "Convolution": "convolutions",
    "FullyConnected": "GEMMs",
    "MatMul": "GEMMs",
    "Attention": "attention",
    "Subgraph": "element-wise",
    "Eltwise": "element-wise",
    "FakeQuantize": "element-wise",
    "Math": "element-wise",
    "MVN": "normalization",
    "Reduce": "normalization",
    "Reorder": "reorders and transpositions",
    "Transpose": "reorders and transpositions",
    "Concatenation": "concatenations",
}


def kernel_times(
    loaded: Loaded, inputs: Mapping[str, Tensor], threads: int, runs: int = RUNS
) -> dict[str, Any]:
    """Milliseconds of a call by group of kernels, products in int8 and in floats apart; least of several runs."""
    assert loaded.ir is not None
    compiled = compile_ir(loaded.ir, inputs, loaded.precision, threads, True)
    request = compiled.create_infer_request()
    feed = {name: x.contiguous().numpy() for name, x in inputs.items()}
    least: dict[str, float] = {}
    for _ in range(runs):
        request.infer(feed)
        for kernel in request.get_profiling_info():
            took = kernel.real_time.total_seconds() * 1e3
            least[kernel.node_name] = min(took, least.get(kernel.node_name, took))
    groups: dict[str, float] = defaultdict(float)
    for op in compiled.get_runtime_model().get_ordered_ops():
        kernel = kernel_of(op)
        took = least.get(op.get_friendly_name(), 0.0)
        if kernel is None or took == 0:
            continue
        group = GROUPS.get(kernel.kind, "other")
        if group in ("convolutions", "GEMMs"):
            group = f"{'int8' if kernel.precision == 'int8' else 'float'} {group}"
        groups[group] += took
    return {"kernel_ms": dict(groups), "kernels": len(least)}


def int8_share(loaded: Loaded, inputs: Mapping[str, Tensor], case: Case) -> dict[str, float]:
    """Share of the network's MACs that ran in int8, by the executed kernels' own names for layers."""
    assert loaded.ir is not None
    compiled = compile_ir(loaded.ir, inputs, loaded.precision, case.threads, False)
    kernels = [kernel_of(op) for op in compiled.get_runtime_model().get_ordered_ops()]
    graph = case.onnx
    ours = loaded.ir.parent.parent / "macs.json"
    if ours.is_file():  # layers that were split or tabulated have names of their own
        from qdeploy.engines.measure import read_macs

        macs = read_macs(ours.parent)[0]
    else:
        macs = graph_macs(graph, {name: list(x.shape) for name, x in inputs.items()})
    share = int8_mac_share([kernel for kernel in kernels if kernel is not None], macs, frozenset())
    return {"int8_mac_share": share["int8_mac_share"], "macs": float(sum(macs.values()))}
