"""qdeploy: W8A8 (W7A8 without VNNI) and W4A8 on OpenVINO, the rest in f32 and bf16, the time path as a table.

Each also with attention in int8.
"""

from __future__ import annotations

from functools import partial

from benchmarks.contenders import PRECISIONS, Case, Contender, Loaded
from qdeploy.system.machine import int8_sums_saturate

# Without VNNI layers with weights of 8 bits would be computed in floats.
WEIGHTS = ("int7" if int8_sums_saturate() else "int8", "int4")


COVERAGES = {"": "portable", " and attention": "portable-attention"}


def _stem(weights: str, coverage: str) -> str:
    return f"ours-w{weights[3:]}a8" + coverage.removeprefix("portable")


def _prepare(case: Case, weights: str, coverage: str, precision: str) -> None:
    from qdeploy.engines.build import build_engine
    from qdeploy.export.run import export
    from qdeploy.workflows.calibrate import calibrate

    ranges: dict[str, str] = {"recipe": "w8a8-minmax-cpu"}
    if case.ranges == "minmax":
        ranges = {"method": "minmax", "activations": "uint8", "target": "openvino"}
    stem = case.folder / _stem(weights, coverage)
    checkpoint = calibrate(
        case.model,
        stem,
        weights=weights,
        calibration=case.folder / "set",
        effort="fast",
        coverage=coverage,
        **ranges,  # type: ignore[arg-type]
    )
    bundle = export(checkpoint, f"{stem}-onnx", time_table="fp32", components=False)
    place = f"{stem}-{precision}"
    build_engine(bundle, place, backend="openvino", precision=precision, threads=case.threads)


def _load(case: Case, weights: str, coverage: str, precision: str) -> Loaded:
    from qdeploy.engines.build import load_engine

    place = case.folder / f"{_stem(weights, coverage)}-{precision}"
    engine = load_engine(place, threads=case.threads)
    return Loaded(engine, next(place.glob("*/openvino_model.xml")), precision)


CONTENDERS = {
    (name := f"qdeploy W{weights[3:]}A8{beside}, {precision}"): Contender(
        name,
        partial(_load, weights=weights, coverage=coverage, precision=precision),
        partial(_prepare, weights=weights, coverage=coverage, precision=precision),
        (f"{_stem(weights, coverage)}-{precision}/",),
        precision=precision,
    )
    for weights in WEIGHTS
    for beside, coverage in COVERAGES.items()
    for precision in PRECISIONS
}
