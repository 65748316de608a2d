"""qdeploy's pipeline folders on OpenVINO: full precision, W8A8, and W8A8 with the decoder in int8 too."""

from __future__ import annotations

from functools import partial

from benchmarks.pipelines import Case, Contender, Opened, diffusers_like

FLOAT_BUNDLE, ENGINE = "float-onnx", "qdeploy-w8a8"
# What reads the sum of all blocks before it, whose outliers cost most; few of all products.
IN_FLOAT = ("*upsamplers*", "*downsamplers*", "*conv_shortcut*")


def prepare_float_bundle(case: Case) -> None:
    """The model as an ONNX bundle; finished ones are taken up."""
    from qdeploy.export.run import export

    export(case.model, case.place(FLOAT_BUNDLE))


def _prepare_float(case: Case) -> None:
    from qdeploy.engines.build import build_engine

    prepare_float_bundle(case)
    place = case.place("qdeploy-float")
    build_engine(
        case.place(FLOAT_BUNDLE), place, backend="openvino", precision=case.precision, threads=case.threads
    )


def _prepare(case: Case, vae: str | None) -> None:
    from qdeploy.calibration_set.collect import collect
    from qdeploy.engines.build import build_engine
    from qdeploy.export.run import export
    from qdeploy.workflows.calibrate import calibrate

    small = case.shape == "scenes"
    data = collect(
        case.model,
        case.place("set"),
        samples=8 if small else 2,
        keep=20 if small else 4,
        steps=20 if small else 4,
        prompts=case.prompts,
        guidance=case.guidance,
        scheduler="ddim",
    )
    finder = {"recipe": "w8a8-minmax-cpu"}
    if not small:  # the finder of least error takes a hundred times as long
        finder = {"method": "minmax", "activations": "uint8", "target": "openvino"}
    checkpoint = calibrate(
        case.model,
        case.place("w8a8"),
        exclude=IN_FLOAT,
        weights=case.weights,
        calibration=data,
        effort="fast",
        **finder,  # type: ignore[arg-type]
    )
    bundle = export(checkpoint, case.place("w8a8-onnx"))
    build_engine(
        bundle,
        case.place(ENGINE if vae is None else f"{ENGINE}-vae-{vae}"),
        backend="openvino",
        precision=case.precision,
        threads=case.threads,
        components=None if vae is None else {"vae": vae},
        calibration=None if vae is None else data,
    )


def _open(case: Case, folder: str) -> Opened:
    import torch

    from qdeploy.sampling.pipeline_folder import load_pipeline

    torch.set_num_threads(case.threads)
    return diffusers_like(load_pipeline(case.place(folder), threads=case.threads), case)


CONTENDERS = [
    Contender("qdeploy, float", partial(_open, folder="qdeploy-float"), "qdeploy-float", _prepare_float),
    Contender(
        "qdeploy W8A8",
        partial(_open, folder=ENGINE),
        ENGINE,
        partial(_prepare, vae=None),
        quantized=True,
    ),
    Contender(
        "qdeploy W8A8, decoder too",
        partial(_open, folder=f"{ENGINE}-vae-w8a8"),
        f"{ENGINE}-vae-w8a8",
        partial(_prepare, vae="w8a8"),
        quantized=True,
        after="qdeploy W8A8",
    ),
]
