"""NNCF's post-training quantization: default mode, transformer mode, and default mode with SmoothQuant."""

from __future__ import annotations

from functools import partial

from benchmarks.contenders import PRECISIONS, Case, Contender
from benchmarks.contenders.openvino_float import load_ir

MODES = ("default", "transformer", "smoothquant")


def _prepare(case: Case, mode: str) -> None:
    import nncf
    import openvino

    target = case.folder / f"nncf-{mode}.xml"
    if target.is_file():
        return
    feeds = case.feeds()
    options: dict[str, object] = {"subset_size": len(feeds)}
    if mode == "transformer":
        options["model_type"] = nncf.ModelType.TRANSFORMER
    if mode == "smoothquant":
        # without a model type NNCF smooths nothing by itself; these are its transformer mode's values
        alphas = nncf.AdvancedSmoothQuantParameters(convolution=0.5, matmul=0.95)
        options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas)
    model = nncf.quantize(openvino.Core().read_model(case.onnx), nncf.Dataset(feeds), **options)
    openvino.save_model(model, target, compress_to_fp16=False)


CONTENDERS = {
    f"NNCF {mode}, {precision}": Contender(
        f"NNCF {mode}, {precision}",
        partial(load_ir, name=f"nncf-{mode}.xml", precision=precision),
        partial(_prepare, mode=mode),
        (f"nncf-{mode}.xml", f"nncf-{mode}.bin"),
        precision=precision,
    )
    for mode in MODES
    for precision in PRECISIONS
}
