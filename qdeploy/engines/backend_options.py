"""Options of a build that only some backends have."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict


class BackendOptions(TypedDict, total=False):
    """Keywords of `build_engine` that `Backend.build_options` lists; None or False leaves one out.

    Attributes:
        device: OpenVINO: what its engine runs on, ``CPU``, ``GPU`` or ``NPU``.
        shapes: TensorRT: optimization profiles, ``NAME:MIN,OPT,MAX;...`` with sizes such as ``2x4x64x64``.
        timing_cache: TensorRT: file that keeps the timings of kernels between builds.
        workspace: TensorRT: GiB that kernels may use for scratch.
        refit: TensorRT: weights can be replaced without a build.
        weight_streaming: TensorRT: weights need not fit on the GPU.
        hardware_compatible: TensorRT: the plan runs on every GPU from Ampere on.
        version_compatible: TensorRT: the plan runs on later versions of TensorRT.
        strip_plan: TensorRT: weights stay outside of the plan.
        optimization_level: TensorRT: 0 to 5, how long to search.
        gpu: TensorRT for RTX: cards to compile for, as ``sm89,rtx5090``.
        time_limit: TensorRT: minutes after which the builder is stopped.
        memory_limit: TensorRT: GiB of memory at which the builder is stopped.
    """

    device: str | None
    shapes: str | None
    timing_cache: str | Path | None
    workspace: float | None
    refit: bool
    weight_streaming: bool
    hardware_compatible: bool
    version_compatible: bool
    strip_plan: bool
    optimization_level: int | None
    gpu: str | None
    time_limit: float | None
    memory_limit: float | None
