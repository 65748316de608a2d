"""What TensorRT would reject, or run slowly, of graphs that other quantizers make: read off the graph, no GPU.

    python -m benchmarks.lint_others --output runs/lint-others --channels 128

The network is shaped like google/ddpm-cifar10-32, with random weights: where Q and DQ stand does not depend on them.
ONNX Runtime's static quantizer, NNCF and (where installed) ModelOpt quantize qdeploy's own float export; qdeploy
quantizes the model. Every graph is linted as it is, and once more after `qdeploy lint --fix`. With ``--build sm89``
TensorRT for RTX builds each as it stands, as a control group: how many of its quantized products are low-bit in the
plan?
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file

from benchmarks.spelled_out_norms import SpelledOutNorms
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.tensorrt.verify import verify
from qdeploy.export.lint.report import LintReport
from qdeploy.export.lint.run import lint
from qdeploy.export.lower import adapt
from qdeploy.export.run import export
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json, write_text
from qdeploy.system.progress import say
from qdeploy.system.tables import Table
from qdeploy.workflows.calibrate import calibrate

HEADER = (
    "quantizer",
    "rejected (E)",
    "slow or inaccurate (W)",
    "int8 MACs",
    "own kernels",
    "after --fix",
    "in the plan",
)


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
    "ModelOpt, int8": ("modelopt", modelopt_int8),
}


def by_rule(report: LintReport, severity: str) -> str:
    """Rules and how often each fires; the waived are not counted."""
    counts = Counter(f.rule for f in report.findings if f.severity == severity and f.waived is None)
    return ", ".join(f"{rule} x{count}" for rule, count in sorted(counts.items())) or "none"


def built(graph: Path, gpu: str) -> tuple[str, dict[str, Any]]:
    """What NVIDIA's builder makes of a graph: quantized products that are low-bit in the plan, and kernels."""
    verdict = verify(graph, gpu=gpu)
    if not verdict.built:
        return f"refused: {verdict.reason[:120]}", {"built": False, "reason": verdict.reason}
    report = verdict.report
    counts = {name: report[name] for name in ("planned", "as_planned", "products")}
    cell = f"{report['as_planned']} of {report['planned']}, {verdict.kernels} kernels"
    return cell, {"built": True, **counts, "kernels": verdict.kernels}


def row_of(name: str, graph: Path, gpu: str | None) -> tuple[list[str], dict[str, Any]]:
    report = lint(graph)
    fixed = lint(graph, fix=graph.parent / f"{graph.stem}-fixed.onnx") if graph.is_file() else report
    share = report.macs["shares"].get("int8", 0.0)
    after = f"{fixed.counts['E']} E, {fixed.counts['W']} W" if graph.is_file() else "as it is"
    cells = [name, by_rule(report, "E"), by_rule(report, "W"), f"{share:.0%}"]
    waived = Counter(finding.rule for finding in report.findings if finding.waived)
    if waived:
        cells[2] += "; waived: " + ", ".join(f"{rule} x{count}" for rule, count in waived.items())
    cells += [str(len(report.macs["own_kernels"])), after]
    if gpu is None:
        return [*cells, "not built"], report.to_json()
    cell, verdict = built(graph, gpu)
    return [*cells, cell], report.to_json() | {"plan": verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/lint-others"))
    parser.add_argument("--channels", type=int, default=128, help="of the first block; 128 is CIFAR-10's")
    parser.add_argument("--build", metavar="GPU", help="also build each graph by TensorRT for RTX")
    arguments = parser.parse_args()
    output = arguments.output / str(arguments.channels)
    output.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)

    model = cifar_shaped(output / "model", arguments.channels)
    data = collect(model, output / "set", samples=4, keep=4, steps=4, scheduler="ddim")
    bundle = export(model, output / "float", calibration=data)
    source = bundle.graph
    table, results = [], {}
    for name, (package, quantizer) in QUANTIZERS.items():
        if importlib.util.find_spec(package) is None:
            say(f"{name}: {package} is not installed")
            continue
        graph = output / f"{name.replace(', ', '-').replace(' ', '-').lower()}.onnx"
        if not graph.exists():
            say(f"quantizing: {name}")
            quantizer(source, graph, bundle)
        cells, results[name] = row_of(name, graph, arguments.build)
        table.append(cells)
    checkpoint = calibrate(
        model, output / "w8a8", recipe="w8a8-minmax", target="tensorrt", effort="fast", calibration=data
    )
    assert isinstance(checkpoint, Artifact)
    ours = export(checkpoint, output / "w8a8-tensorrt")
    cells, results["qdeploy"] = row_of("qdeploy, target tensorrt", ours.path, arguments.build)
    table.append(cells)
    write_json(output / "lint.json", results)
    write_text(output / "lint.md", Table(HEADER, table).markdown())
    print(Table(HEADER, table).text())


if __name__ == "__main__":
    main()
