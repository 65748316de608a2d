"""What the machine can do at best: one large convolution in each precision, and a copy of memory."""

from __future__ import annotations

import time

import numpy as np

from qdeploy.system.machine import has_bf16

CHANNELS, SIZE, ROWS = 256, 32, 4
COPIED = 2**28  # bytes, beyond any cache


def limits(threads: int) -> dict[str, float]:
    """Operations per second (two per MAC) of a 3x3 convolution, in 1e9, and bytes per second of a copy, in 1e9.

    Of bf16 only where the processor has it.
    """
    precisions = ("f32", *(("bf16",) if has_bf16() else ()), "int8")
    found = {f"{precision}_gops": _convolution(precision, threads) for precision in precisions}
    source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    took = min(_timed(lambda: np.copyto(target, source)) for _ in range(5))
    return found | {"copy_gb_per_s": 2 * COPIED / took / 1e9}


def _timed(call: object) -> float:
    began = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - began


def _convolution(precision: str, threads: int) -> float:
    import openvino
    from openvino import opset13 as op

    random = np.random.default_rng(0)
    shape = [ROWS, CHANNELS, SIZE, SIZE]
    x = op.parameter(shape, openvino.Type.f32)
    # two in a row: the first one's input has to be brought into the layout of convolutions, the second one's is
    y = x
    for _ in range(2):
        if precision == "int8":
            ends = [op.constant(np.float32(value)) for value in (-4, 4 * 127 / 128)]
            y = op.fake_quantize(y, *ends, *ends, 256)
            codes = op.constant(random.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8))
            scale = op.constant(np.full((CHANNELS, 1, 1, 1), 1e-4, np.float32))
            w = op.multiply(op.convert(codes, "f32"), scale)
        else:
            w = op.constant(random.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32))
        y = op.convolution(y, w, [1, 1], [1, 1], [1, 1], [1, 1])
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERF_COUNT": True,
    }
    compiled = openvino.Core().compile_model(openvino.Model([y], [x], "limit"), "CPU", options)
    request, least = compiled.create_infer_request(), float("inf")
    for _ in range(40):
        request.infer([random.normal(size=shape).astype(np.float32)])
        told = request.get_profiling_info()
        took = [k.real_time.total_seconds() for k in told if k.node_type == "Convolution"]
        least = min(least, *took)
    return 2 * ROWS * SIZE**2 * CHANNELS**2 * 9 / least / 1e9
