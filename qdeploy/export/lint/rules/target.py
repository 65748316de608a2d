"""Findings that depend on the GPU and on the shapes."""

from __future__ import annotations

from collections import Counter

from qdeploy.export.graph.network import Network
from qdeploy.export.graph.quantizer import FP4, FP8, INT8
from qdeploy.export.graph.shapes import infer
from qdeploy.export.lint.forecast import forecast
from qdeploy.export.lint.rule import E, Hit, Hits, I, rule
from qdeploy.export.lint.scope import Scope
from qdeploy.system.errors import InvalidInputError

LARGEST = 5  # islands and reasons that people are shown; programs get all
# Compute capability from which a type has tensor-core kernels.
CAPABILITY = {INT8: (7, 5), FP8: (8, 9), FP4: (10, 0)}


@rule(
    "TRT035",
    E,
    "every dynamic input has a profile: min <= opt <= max, one size per symbol, and shapes that fit",
    "an invalid profile fails in the builder; sizes that skips cannot be joined at, at run time",
    "HDR",
)
def profile(net: Network, scope: Scope) -> Hits:
    stored = net.model.graph.initializers
    inputs = {value.name or "": value for value in net.model.graph.inputs if value.name not in stored}
    dynamic = {
        name: [str(size) for size in value.shape if not isinstance(size, int)]
        for name, value in inputs.items()
        if value.shape is not None
    }
    if not scope.profile:
        if symbols := sorted({size for sizes in dynamic.values() for size in sizes}):
            yield Hit("inputs", f"{', '.join(symbols)} dynamic: give shapes to have them checked", I)
        return
    for unknown in scope.profile.keys() - inputs.keys():
        yield Hit(
            unknown, "the profile names no input of the graph: use one of " + ", ".join(map(str, inputs))
        )
    sizes: dict[tuple[str, int], set[int]] = {}
    for name, value in inputs.items():
        shapes = scope.profile.get(name or "")
        if shapes is None:
            if dynamic.get(name):
                yield Hit(name, f"dynamic ({', '.join(dynamic[name])}), but the profile has no shapes for it")
            continue
        declared = list(value.shape) if value.shape is not None else []
        if any(len(shape) != len(declared) for shape in shapes):
            yield Hit(name, f"has {len(declared)} axes: give as many sizes")
            continue
        for axis, size in enumerate(declared):
            given = [shape[axis] for shape in shapes]
            if given != sorted(given) or given[0] < 1:
                yield Hit(name, f"axis {axis} is {given}: give 1 <= min <= opt <= max")
            if isinstance(size, int) and given != [size] * 3:
                yield Hit(name, f"axis {axis} is {size} in the graph: give that")
            if not isinstance(size, int):
                for which, number in enumerate(given):
                    sizes.setdefault((str(size), which), set()).add(number)
    for (symbol, which), numbers in sizes.items():
        if len(numbers) > 1:
            kind = ("min", "opt", "max")[which]
            yield Hit(symbol, f"{kind} has the sizes {sorted(numbers)} for one symbol: give one")
    yield from _fits(net, scope)


def _fits(net: Network, scope: Scope) -> Hits:
    for which, kind in enumerate(("min", "opt", "max")):
        try:
            infer(net.model, {name: sizes[which] for name, sizes in scope.profile.items()}, strict=True)
        except InvalidInputError:
            what = f"the {kind} shapes do not fit through the network"
            yield Hit("shapes", f"{what}: sizes have to divide by what it halves them")


@rule(
    "TRT042",
    E,
    "the GPU has kernels for the types",
    "INT8 needs compute capability 7.5, FP8 8.9, FP4 10.0 (dynamic: TensorRT 11)",
    "DOC, MO",
)
def capability(net: Network, scope: Scope) -> Hits:
    kinds = {q.codes for q in net.quantizers if q.quantizes}
    kinds |= {FP4} if any(node.op_type == "TRT_FP4DynamicQuantize" for node in net.nodes) else set()
    for kind, needed in CAPABILITY.items():
        if kind in kinds and scope.compute_capability and scope.compute_capability < needed:
            have = ".".join(map(str, scope.compute_capability))
            yield Hit(
                "graph", f"{kind.name} needs compute capability {'.'.join(map(str, needed))}, this is {have}"
            )
    if scope.tensorrt < (11, 0):
        for node in net.nodes:
            if node.op_type == "TRT_FP4DynamicQuantize":
                yield Hit(node, "dynamic FP4 needs TensorRT 11: quantize the weights only")


@rule(
    "TRT043",
    I,
    "most multiplications are in low bits, in few islands",
    "this is what a speed-up is made of, and why there is none",
    "INF",
)
def report(net: Network, scope: Scope) -> Hits:
    said = forecast(net)
    yield Hit("graph", said.sentence())
    for layer in said.floats[:LARGEST]:
        if layer.share >= 0.01:
            yield Hit(layer.name, f"{layer.share:.1%} of the multiplications, in {layer.kind}: {layer.why}")
    for why, count in Counter(pair.why for pair in said.kernels).most_common(LARGEST):
        yield Hit("graph", f"{count} Q or DQ with a kernel of their own: {why}")
