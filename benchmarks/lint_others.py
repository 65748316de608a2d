"""What TensorRT would reject, or run slowly, of graphs that other quantizers make, and what it makes of them: no GPU.

    python -m benchmarks.lint_others --build sm89 -o benchmarks/results/lint-others.json

The network is shaped like google/ddpm-cifar10-32, with random weights: where Q and DQ stand does not depend on them.
ONNX Runtime's static quantizer, NNCF and ModelOpt, where they are installed, quantize qdeploy's own float export;
qdeploy quantizes the model. Every graph is linted as it is, and once more after `qdeploy lint --fix`. With
``--build`` TensorRT for RTX builds each as it stands, as a control group: how many of its quantized products are
low-bit in the plan? Rows that the output has already are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file

from benchmarks.lint_others_report import table
from benchmarks.spelled_out_norms import SpelledOutNorms
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.tensorrt.flavour import RTX
from qdeploy.engines.tensorrt.verify import verify
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.export.lint.report import LintReport
from qdeploy.export.lint.run import graph_file, lint
from qdeploy.export.lower import adapt
from qdeploy.export.products import products
from qdeploy.export.run import export
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json
from qdeploy.system.machine import machine
from qdeploy.system.progress import say
from qdeploy.workflows.calibrate import calibrate


def cifar_shaped(folder: Path, channels: int) -> Path:
    """A pipeline of the shape of google/ddpm-cifar10-32, of ``channels`` to twice as many."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(channels, *[2 * channels] * 3),
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=min(32, channels // 4),
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    if not folder.exists():
        DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def rows(bundle: Artifact) -> Iterator[dict[str, np.ndarray]]:
    """The bundle's probe, row by row, as its graph takes it."""
    probe = load_file(bundle.file("probe.safetensors"))
    for row in range(4):
        yield {
            "sample": probe["input.sample"][row : row + 1].numpy(),
            "timestep": probe["input.timestep"][row].float().numpy(),
        }


def onnxruntime_static(source: Path, target: Path, bundle: Artifact, **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = rows(bundle)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    kind = options.pop("activation_type", QuantType.QUInt8)
    quantize_static(source, target, Reader(), activation_type=kind, weight_type=QuantType.QInt8, **options)


def as_advised(source: Path, target: Path, bundle: Artifact) -> None:
    """ONNX Runtime's quantizer with what its documentation advises for TensorRT."""
    from onnxruntime.quantization import QuantType

    extra = {"ActivationSymmetric": True, "WeightSymmetric": True, "AddQDQPairToWeight": True}
    extra |= {"QuantizeBias": False, "DedicatedQDQPair": False}
    kinds = ["Conv", "MatMul", "Gemm"]
    onnxruntime_static(
        source,
        target,
        bundle,
        activation_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=kinds,
        extra_options=extra,
    )


def nncf_default(source: Path, target: Path, bundle: Artifact, **options: Any) -> None:
    import nncf
    import onnx

    quantized = nncf.quantize(
        onnx.load(source),
        nncf.Dataset(list(rows(bundle))),
        subset_size=4,
        fast_bias_correction=True,
        **options,
    )
    onnx.save(quantized, target)


def nncf_gpu(source: Path, target: Path, bundle: Artifact) -> None:
    import nncf

    nncf_default(source, target, bundle, preset=nncf.QuantizationPreset.PERFORMANCE)


def modelopt_int8(source: Path, target: Path, bundle: Artifact) -> None:
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Row by row: arrays would be cut along a first axis, which a timestep does not have."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.rows = rows(bundle)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

        def get_first(self) -> dict[str, np.ndarray]:
            return next(rows(bundle))

    # It drops the types that the graph tells and has ONNX infer them again, which ends at a GroupNormalization of
    # opset 21. The tensors behind it are then not calibrated, though Concats among them are looked up: KeyError.
    own = target.with_suffix(".source.onnx")
    spelled_out = ir.load(source)
    adapt(spelled_out, (SpelledOutNorms,))
    ir.save(spelled_out, own)
    quantize(
        str(own),
        quantize_mode="int8",
        calibration_data_reader=Reader(),
        calibration_eps=["cpu"],
        output_path=str(target),
    )


QUANTIZERS: dict[str, tuple[str, Callable[..., None]]] = {
    "ONNX Runtime, defaults": ("onnxruntime", onnxruntime_static),
    "ONNX Runtime, as advised for TensorRT": ("onnxruntime", as_advised),
    "NNCF, mixed preset": ("nncf", nncf_default),
    "NNCF, performance preset": ("nncf", nncf_gpu),
    "ModelOpt, int8": ("nvidia-modelopt", modelopt_int8),
}
OURS = "qdeploy, `w8a8-minmax`, target tensorrt"


def by_rule(report: LintReport, severity: str, waived: bool = False) -> dict[str, int]:
    """How often each rule fires; those that the exporter waives are counted apart."""
    found = (f.rule for f in report.findings if f.severity == severity and (f.waived is not None) == waived)
    return dict(sorted(Counter(found).items()))


def built(graph: Path, gpu: str) -> dict[str, Any]:
    """What NVIDIA's builder makes of a graph: quantized products that are low-bit in the plan, and kernels."""
    verdict = verify(graph, gpu=gpu)
    if not verdict.built:
        return {"built": False, "reason": verdict.reason}
    report = verdict.report
    counts = {name: report[name] for name in ("planned", "as_planned", "kinds", "in_float", "products")}
    layers = len(products(graph_file(graph)))
    wide = len(report["float32_results"])
    return {"built": True, "layers": layers, **counts, "float32_results": wide, "kernels": verdict.kernels}


def measured(graph: Path, gpu: str | None) -> dict[str, Any]:
    """One graph: what the rules find before and after `qdeploy lint --fix`, and what the builder makes of it."""
    report = lint(graph)
    row: dict[str, Any] = {
        "errors": by_rule(report, "E"),
        "warnings": by_rule(report, "W"),
        "waived": by_rule(report, "W", waived=True),
        "int8_macs": report.macs["shares"].get("int8", 0.0),
        "own_kernels": len(report.macs["own_kernels"]),
    }
    if graph.is_file():
        fixed = lint(graph, fix=graph.parent / f"{graph.stem}-fixed.onnx")
        row["after_fix"] = {severity: fixed.counts[severity] for severity in "EW"}
    return row if gpu is None else row | {"plan": built(graph, gpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/lint-others"), help="for models and graphs")
    parser.add_argument("--channels", type=int, default=128, help="of the first block; 128 is CIFAR-10's")
    parser.add_argument("--build", metavar="GPU", help="also build each graph by TensorRT for RTX")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.folder / str(arguments.channels)
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)

    asked = {"channels": arguments.channels, "gpu": arguments.build}
    content: dict[str, Any] = {**asked, "machine": machine(), "results": []}
    if arguments.build:
        content["builder"] = f"{RTX.backend} {load_tensorrt(RTX).__version__}"
    if arguments.output.is_file():
        earlier = json.loads(arguments.output.read_text())
        if all(earlier.get(name) == value for name, value in asked.items()):
            content["results"] = earlier["results"]

    model = cifar_shaped(folder / "model", arguments.channels)
    data = collect(model, folder / "set", samples=4, keep=4, steps=4, scheduler="ddim")
    bundle = export(model, folder / "float", calibration=data)

    def graph_of(quantizer: Callable[..., None], name: str) -> Path:
        graph = folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}.onnx"
        if not graph.exists():
            say(f"quantizing: {name}")
            quantizer(bundle.graph, graph, bundle)
        return graph

    def ours() -> Path:
        checkpoint = calibrate(
            model, folder / "w8a8", recipe="w8a8-minmax", target="tensorrt", effort="fast", calibration=data
        )
        assert isinstance(checkpoint, Artifact)
        return export(checkpoint, folder / "w8a8-tensorrt").path

    for name, (package, quantizer) in {**QUANTIZERS, OURS: ("qdeploy", None)}.items():
        try:
            named = {"quantizer": name, "version": version(package)}
        except PackageNotFoundError:
            say(f"{name}: {package} is not installed")
            continue
        if any(named.items() <= row.items() for row in content["results"]):
            continue
        graph = ours() if quantizer is None else graph_of(quantizer, name)
        kept = [row for row in content["results"] if row["quantizer"] != name]
        content["results"] = [*kept, named | measured(graph, arguments.build)]
        write_json(arguments.output, content)
    print(table(content["results"]).text())


if __name__ == "__main__":
    main()
