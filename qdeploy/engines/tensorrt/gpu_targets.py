"""Which GPUs an engine is compiled for, and what each of them lacks.

Verdicts on kernels were read from plans that TensorRT for RTX 1.7.1 built for each target.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qdeploy.engines.tensorrt.flavour import Flavour
from qdeploy.engines.tensorrt.graph import Graph
from qdeploy.engines.tensorrt.versions import member
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.gpu import Gpu

if TYPE_CHECKING:
    from qdeploy.export.products import Product

# Compute capabilities by what NVIDIA calls the cards; a generation's cards share one.
CARDS = {
    r"rtx20[678]0|gtx16\d0|t4|quadrortx\d+": 75,
    r"a100|a30": 80,
    r"rtx30[5-9]0|rtxa\d+|a2|a10|a16|a40": 86,
    r"rtx40[5-9]0|rtx\d+ada|l4|l40s?": 89,
    r"rtx50[5-9]0|rtxpro\d+(blackwell)?": 120,
    r"gb10|dgxspark": 121,
}
# Cards that TensorRT for RTX does not compile for, by name and by number.
FOREIGN = {r"h100|h200|gh200|sm90": "Hopper", r"b100|b200|b300|gb200|sm100|sm103": "data-centre Blackwell"}
# The smallest compute capability that has kernels of a low-bit type.
NEEDS = {"int8": 75, "int4": 80, "fp8": 89, "fp4": 120, "mxfp8": 120}


def parse_gpus(text: str, flavour: Flavour) -> tuple[int, ...]:
    """Compute capabilities of ``sm89,rtx5090``, ascending.

    Raises:
        UsageError: a card is unknown.
        CapabilityError: the library does not compile for one.
    """
    found = {_sm(word, flavour) for word in filter(None, (word.strip() for word in text.split(",")))}
    if not found:
        raise UsageError("--gpu names no GPU: write --gpu sm89,sm120 or --gpu rtx4090")
    return tuple(sorted(found))


def _sm(word: str, flavour: Flavour) -> int:
    name = re.sub(r"[\s_.-]|geforce|nvidia|super|laptop", "", word.lower()).removesuffix("ti")
    for pattern, what in FOREIGN.items():
        if re.fullmatch(pattern, name):
            raise CapabilityError(
                f"{flavour.title} does not compile for {word} ({what}): build there with --backend tensorrt"
            )
    for pattern, sm in CARDS.items():
        if re.fullmatch(pattern, name):
            return sm
    match = re.fullmatch(r"(?:sm)?(\d+)", name)
    if match and int(match[1]) in flavour.targets:
        return int(match[1])
    able = ", ".join(f"sm{sm}" for sm in flavour.targets)
    raise UsageError(f"--gpu does not know {word!r}: name a card, such as rtx4090, or one of {able}")


def choose_targets(flavour: Flavour, asked: str | None, graph: Graph, gpu: Gpu | None) -> tuple[int, ...]:
    """What to compile for: what was asked for; else this machine's GPU; else the default set.

    The default set is reduced to the GPUs that have kernels for the graph's low-bit types.

    Returns:
        Compute capabilities, ascending; empty for a library that builds for this machine's GPU alone.

    Raises:
        UsageError, CapabilityError: see `parse_gpus` and `check_targets`.
    """
    if not flavour.targets:
        return ()
    if asked is not None:
        targets = parse_gpus(asked, flavour)
    elif gpu is not None:
        targets = (gpu.sm,)
    else:
        least = max((NEEDS.get(kind, 0) for kind in graph.low_bit), default=0)
        targets = tuple(sm for sm in flavour.default_targets if sm >= least)
    check_targets(flavour, targets, graph)
    return targets


def check_targets(flavour: Flavour, targets: Sequence[int], graph: Graph) -> None:
    """Refuse GPUs that have no kernels for a graph.

    Raises:
        CapabilityError: a target is unknown to the library, or lacks a type of the graph.
    """
    for sm in targets:
        if sm not in flavour.targets:
            able = ", ".join(f"sm{known}" for known in flavour.targets)
            raise CapabilityError(f"{flavour.title} does not compile for sm{sm}, it does for {able}")
        for kind in sorted(graph.low_bit):
            if sm < NEEDS.get(kind, 0):
                raise CapabilityError(
                    f"{kind} needs sm{NEEDS[kind]} or newer, and sm{sm} was asked for: build for "
                    f"--gpu sm{NEEDS[kind]}, or calibrate in another format"
                )
    if 75 in targets and len(targets) > 1 and "int8" in graph.low_bit:
        raise CapabilityError(
            "sm75 has no int8 convolutions, and in one engine with it the other GPUs lose theirs: build an "
            "engine for sm75 alone"
        )


def check_products(
    flavour: Flavour, version: tuple[int, ...], targets: Sequence[int], found: Sequence[Product]
) -> None:
    """Refuse products that the library's version or a target has no kernels for; they fail late in a build.

    Args:
        flavour: the library.
        version: its version.
        targets: compute capabilities.
        found: the products of the graph in the types that it will be built in.

    Raises:
        CapabilityError: a product cannot be computed.
    """
    if version[:2] < flavour.int8_convolutions and any(
        product.operator == "Conv" and product.kind == "int8" for product in found
    ):
        needed = ".".join(map(str, flavour.int8_convolutions))
        raise CapabilityError(
            f"{flavour.title} {'.'.join(map(str, version))} has no int8 convolutions, {needed} has them: "
            f"{flavour.install} --upgrade"
        )
    single = [p.name for p in found if p.single and not p.kind and p.operator in ("Gemm", "MatMul")]
    if 75 in targets and single:
        raise CapabilityError(
            f"sm75 has no float32 matrix products, and {single[0]} is one of {len(single)}: export with "
            "--time-table fp32 and build with --precision f16"
        )


def set_targets(trt: Any, settings: Any, targets: Sequence[int]) -> None:
    """Tell a builder's configuration what to compile for."""
    if not targets:
        return
    settings.num_compute_capabilities = len(targets)
    for index, sm in enumerate(targets):
        settings.set_compute_capability(member(trt, "ComputeCapability", f"SM{sm}"), index)
