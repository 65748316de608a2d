"""ONNX Runtime: full precision, and its own static quantization (u8s8, Q/DQ, weights per channel)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Case, Contender, Loaded
from qdeploy.export.lint.rules.graph import PROTOBUF_LIMIT

STATIC = "onnxruntime-static.onnx"


def load_onnx(case: Case, name: str | None) -> Loaded:
    """A graph in the case's folder, or the full-precision one, on ONNX Runtime's CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    path = case.onnx if name is None else case.folder / name
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        feed = {port: x.contiguous().numpy() for port, x in inputs.items()}
        return torch.from_numpy(session.run(None, feed)[0])

    return Loaded(call)


def _prepare(case: Case) -> None:
    import onnxruntime.quantization as quantization

    if (case.folder / STATIC).is_file():
        return

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(case.feeds())

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    ready = case.folder / "onnxruntime-preprocessed.onnx"
    # Larger graphs keep their weights in a file beside.
    large = sum(file.stat().st_size for file in case.onnx.parent.iterdir()) >= PROTOBUF_LIMIT
    quantization.quant_pre_process(
        str(case.onnx), str(ready), skip_symbolic_shape=True, save_as_external_data=large
    )
    quantization.quantize_static(
        str(ready),
        str(case.folder / STATIC),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        use_external_data_format=large,
    )


CONTENDERS = {
    "ONNX Runtime fp32": Contender("ONNX Runtime fp32", partial(load_onnx, name=None), floating=True),
    "ONNX Runtime static int8": Contender(
        "ONNX Runtime static int8", partial(load_onnx, name=STATIC), _prepare, (STATIC,)
    ),
}
