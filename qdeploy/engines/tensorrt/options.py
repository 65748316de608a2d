"""What a build can be asked for, and which options exclude each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.graph import Graph
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.gpu import Gpu

GIB = 2**30
PRECISIONS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Options:
    """A build's options, as on the command line.

    Attributes:
        precision: what is not quantized is computed in.
        batch: batch size that the default profile is tuned for.
        shapes: optimization profiles (see `qdeploy.engines.tensorrt.profiles`); derived from the graph if None.
        timing_cache: file that remembers the timings of kernels between builds.
        workspace: GiB that kernels may use for scratch; TensorRT's own limit, all of the GPU, if None.
        refit: weights can be replaced without a build.
        weight_streaming: weights may stay in the machine's memory, at the price of speed.
        hardware_compatible: the plan runs on every GPU from Ampere on, somewhat slower.
        version_compatible: the plan runs on later versions of TensorRT, somewhat slower.
        strip_plan: the plan holds no weights; they are read from the ONNX file in its folder when it is loaded.
        optimization_level: 0 to 5, how long to search; TensorRT's own default if None.
        gpu: GPUs to compile for, as ``sm89,rtx5090``; see `qdeploy.engines.tensorrt.gpu_targets`.
        time_limit: minutes after which the builder is stopped; no limit if None.
        memory_limit: GiB of memory at which the builder is stopped; no limit if None.
    """

    precision: str = "f32"
    batch: int = 1
    shapes: str | None = None
    timing_cache: Path | None = None
    workspace: float | None = None
    refit: bool = False
    weight_streaming: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_plan: bool = False
    optimization_level: int | None = None
    gpu: str | None = None
    time_limit: float | None = None
    memory_limit: float | None = None

    @property
    def workspace_bytes(self) -> int | None:
        """The limit for scratch memory in bytes."""
        return None if self.workspace is None else int(self.workspace * GIB)

    def facts(self) -> dict[str, Any]:
        """What determines the plan; the place of the cache and limits of the builder do not."""
        return {name: value for name, value in asdict(self).items() if name not in (*LIMITS, "timing_cache")}


# Options that bound the builder and leave the plan as it is.
LIMITS = ("time_limit", "memory_limit")
# Those that ``build-engine`` hands on, as keywords and, with dashes, as options.
_ALL = tuple(field.name for field in fields(Options) if field.name not in ("precision", "batch"))
BUILD_OPTIONS = tuple(name for name in _ALL if name != "gpu")
# TensorRT for RTX compiles without a GPU: nothing is timed, the GPUs are named by --gpu, and versions 1.5 to 1.7 fail
# on plans that can be refitted, hold no weights or run on other versions where no GPU is there.
_LACKING = ("timing_cache", "refit", "strip_plan", "version_compatible", "hardware_compatible")
RTX_BUILD_OPTIONS = tuple(name for name in _ALL if name not in _LACKING)

# Wishes that cannot be granted together, or at all, wherever the build runs.
_CONFLICTS: tuple[tuple[Callable[[Options], bool], str], ...] = (
    (lambda o: o.precision not in PRECISIONS, f"the precision must be one of {', '.join(PRECISIONS)}"),
    (lambda o: o.batch < 1, "the batch must be at least 1"),
    (lambda o: o.workspace is not None and o.workspace <= 0, "--workspace must be more than 0 GiB"),
    (
        lambda o: any(limit is not None and limit <= 0 for limit in (o.time_limit, o.memory_limit)),
        "--time-limit and --memory-limit must be more than 0",
    ),
    (
        lambda o: o.optimization_level is not None and not 0 <= o.optimization_level <= 5,
        "--optimization-level must be from 0 to 5",
    ),
    (
        lambda o: o.optimization_level == 0 and o.timing_cache is not None,
        "--optimization-level 0 measures nothing, so that --timing-cache has no effect: leave one out",
    ),
    (
        lambda o: o.version_compatible and (o.refit or o.strip_plan),
        "--version-compatible plans run on a reduced runtime that may be unable to take weights: leave out "
        "--refit and --strip-plan",
    ),
    (
        lambda o: o.strip_plan and o.weight_streaming,
        "--strip-plan leaves no weights in the plan that --weight-streaming could stream: leave one out",
    ),
    (
        lambda o: o.strip_plan and o.refit,
        "--strip-plan takes back the weights it was built with, --refit others: leave one out",
    ),
)


def check_options(options: Options) -> None:
    """Refuse what makes no sense on any machine.

    Raises:
        UsageError: an impossible value, or options that exclude each other.
    """
    for wrong, sentence in _CONFLICTS:
        if wrong(options):
            raise UsageError(sentence)


# What a GPU must be at least, by compute capability as one number.
_NEEDS: tuple[tuple[str, int, Callable[[Options, Graph], bool]], ...] = (
    ("--hardware-compatible plans", 80, lambda o, g: o.hardware_compatible),
    ("bf16", 80, lambda o, g: o.precision == "bf16"),
    ("fp8", 89, lambda o, g: "fp8" in g.low_bit),
    ("int8", 75, lambda o, g: "int8" in g.low_bit),
)


def check_machine(options: Options, graph: Graph, gpu: Gpu) -> None:
    """Refuse what this GPU has no kernels for.

    Raises:
        CapabilityError: the GPU is too old, or too small for the weights.
        UsageError: the graph's version of ONNX's operators lacks what it uses.
    """
    for what, sm, needed in _NEEDS:
        if needed(options, graph) and gpu.sm < sm:
            raise CapabilityError(
                f"{what} need compute capability {sm / 10} or newer, the {gpu.name} has {gpu.sm / 10}"
            )
    if "int4" in graph.low_bit and graph.opset < 21:
        raise UsageError(f"int4 weights need opset 21, the graph has {graph.opset}: export it again")
    if graph.weight_bytes > gpu.memory and not options.weight_streaming:
        raise CapabilityError(
            f"the weights take {graph.weight_bytes / GIB:.1f} GiB, the {gpu.name} has {gpu.memory / GIB:.1f}: "
            "pass --weight-streaming"
        )
