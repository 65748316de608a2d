"""optimum's pipelines on ONNX Runtime, with the full-precision graphs that qdeploy exports."""

from __future__ import annotations

from benchmarks.pipelines import Case, Contender, Opened, diffusers_like
from benchmarks.pipelines.qdeploy_engines import FLOAT_BUNDLE


def _open(case: Case) -> Opened:
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTDiffusionPipeline

    torch.set_num_threads(case.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    pipeline = ORTDiffusionPipeline.from_pretrained(
        case.place(FLOAT_BUNDLE), session_options=options, local_files_only=True
    )
    return diffusers_like(pipeline, case)


CONTENDERS = [
    Contender("ONNX Runtime, float", _open, FLOAT_BUNDLE, environment="optimum-onnx", after="qdeploy, float")
]
