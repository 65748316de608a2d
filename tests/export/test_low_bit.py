"""int4 weights in blocks and fp8, from calibration to a graph: the same numbers, few bits, clean for TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import Result
from torch import Tensor

from qdeploy.calibrate.methods import minmax, qdiffusion
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.export.graph import constant, producer, save
from qdeploy.export.lint.run import graph_file, lint
from qdeploy.export.lower import lower
from qdeploy.export.macs import meant_int8
from qdeploy.export.run import export
from qdeploy.export.trace import OUTPUT, trace
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.quant.state import code_shapes, read_state, write_state
from qdeploy.store.artifact import Artifact
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import MemoryRows, calibrating, codes_of, dit_rows, plain_options, sqnr_db, tiny_unet
from tests.models import ddpm_folder, tiny_dit

pytestmark = pytest.mark.slow

CASES = {"int4b64": "none", "int4b128": "none", "fp8": "fp8"}
DATA = MemoryRows.noisy()


NETWORKS: dict[str, Any] = {
    "unet": (lambda: tiny_unet((32, 64)), lambda: DATA),
    "dit": (tiny_dit, lambda: dit_rows(DATA)),
}


class Case:
    """A network in one of the formats: simulated, its state, and its graph for TensorRT."""

    def __init__(self, network: str, weights: str, folder: Path) -> None:
        make, rows = NETWORKS[network]
        self.denoiser, self.data = make(), rows()
        self.weights, self.path = weights, folder / "model.onnx"
        recipe = {"weights": weights, "activations": CASES[weights], "target": "tensorrt"}
        with calibrating(self.denoiser, self.data, folder / "checkpoint", **recipe) as session:
            minmax.WeightRanges(finder="lp").run(session)
            minmax.ActivationRanges(finder="lp").run(session)
            for layer in quantized_layers(self.denoiser).values():
                minmax.round_to_nearest(layer)
        self.state, self.shapes = read_state(self.denoiser), code_shapes(self.denoiser)
        self.codes = codes_of(self.denoiser)
        self.rows = list(range(0, len(self.data), 5))
        with torch.no_grad():
            self.simulated = denoise(self.denoiser, self.inputs())
            self.reference = denoise(make(), self.inputs())
        freeze(self.denoiser)
        self.model = lower(trace(self.denoiser, self.data.inputs([0, 1])), "tensorrt")
        self.model.producer_name = "qdeploy"
        self.model.metadata_props["qdeploy.precision"] = weights
        save(self.model, self.path)

    def inputs(self) -> dict[str, Tensor]:
        return {**self.data.inputs(self.rows), "timestep": torch.full((len(self.rows),), 500.0)}

    def run(self) -> Tensor:
        engine = onnxruntime.InferenceSession(self.path, plain_options(), providers=["CPUExecutionProvider"])
        feeds = {name: x.numpy() for name, x in self.inputs().items()} | {
            "timestep": np.array(500, np.float32)
        }
        return torch.from_numpy(engine.run([OUTPUT], feeds)[0])


@pytest.fixture(
    scope="module",
    params=[("unet", "int4b64"), ("unet", "fp8"), ("dit", "int4b128"), ("dit", "fp8")],
    ids=lambda pair: "-".join(pair),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(*request.param, tmp_path_factory.mktemp("low-bit"))


def test_onnx_runtime_computes_what_torch_simulated(case: Case) -> None:
    """By the median row: where a rounding of fp8 flips, a row is as far off as that rounding amounts to."""
    computed = case.run()
    assert median(sqnr_by_row(computed, case.simulated)) >= 45
    assert 8 < sqnr_db(case.reference, computed) < 45  # it is quantized, and not lost


def test_the_graph_is_clean_for_tensorrt(case: Case) -> None:
    for version in ("10.8", "11.4"):
        report = lint(case.path, tensorrt=version)
        told = [(f.rule, f.message) for f in report.findings if f.severity in "EW" and f.waived is None]
        assert told == []
    assert report.macs["shares"]["fp8" if case.weights == "fp8" else "int4"] > 0
    assert meant_int8(case.path) == set()


def test_weights_are_stored_in_their_bits_along_the_right_axis(case: Case) -> None:
    layers = quantized_layers(case.denoiser)
    wanted = ir.DataType.FLOAT8E4M3FN if case.weights == "fp8" else ir.DataType.INT4
    found = Counter(node.name.partition("/")[0] for node in case.model.graph if node.name)
    assert layers.keys() <= found.keys()
    for node in case.model.graph:
        path, _, part = (node.name or "").partition("/")
        if path not in layers or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        dequantize = producer(node.inputs[1])
        assert dequantize is not None
        codes, scale = dequantize.inputs[:2]
        assert codes is not None
        assert codes.dtype == wanted
        as_is = node.op_type == "Conv" or ("transB" in node.attributes and node.attributes["transB"].as_int())
        numbers, scales = constant(codes).astype(np.float32), constant(scale)
        if not as_is:
            numbers, scales = numbers.T, scales.T
        quantizer: Any = layers[path].weight_quantizers[int(part or 0)]
        assert np.array_equal(numbers, case.codes[path, int(part or 0)].float().numpy())
        assert np.array_equal(scales, quantizer.scale.numpy())
        if quantizer.format.block:
            assert dequantize.attributes["axis"].as_int() == (1 if as_is else 0)
            assert dequantize.attributes["block_size"].as_int() == quantizer.format.block


def test_state_is_written_and_read_without_loss(case: Case) -> None:
    for name, tensor in case.state.items():
        if name.endswith(".codes"):
            assert tensor.dtype == (torch.float8_e4m3fn if case.weights == "fp8" else torch.uint8)
    make, rows = NETWORKS["dit" if "class_labels" in case.data.tensors else "unet"]
    fresh = make()
    recipe = {"weights": case.weights, "activations": CASES[case.weights], "target": "tensorrt"}
    with calibrating(fresh, rows(), case.path.parent / "again", **recipe):
        write_state(fresh, case.state, case.shapes)
    with torch.no_grad():
        assert torch.equal(denoise(fresh, case.inputs()), case.simulated)


def test_rounding_is_learned_within_blocks(tmp_path: Path) -> None:
    """Codes are floor or ceiling on the grid of each block, and some are not the nearest."""
    network, data = tiny_dit(), dit_rows(DATA)
    with calibrating(
        network, data, tmp_path / "x", weights="int4b64", activations="none", target="tensorrt"
    ) as session:
        minmax.WeightRanges(finder="minmax").run(session)
        qdiffusion.AdaRound(lr=0.05).run(session)
    learned = 0
    for layer in quantized_layers(network).values():
        for quantizer, weight in layer.weight_pairs():
            assert quantizer.codes is not None
            steps = weight / quantizer.scale.repeat_interleave(64, dim=1)
            assert torch.all((quantizer.codes - steps).abs() < 1 + 1e-4)
            learned += int((quantizer.codes != quantizer.nearest(weight)).sum())
    assert learned > 0


# -- the verbs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("wide")
    model = ddpm_folder(folder / "model", channels=(32, 64))
    return model, collect(model, folder / "set", samples=4, keep=2, steps=4, scheduler="ddim")  # type: ignore[return-value]


@pytest.mark.parametrize("preset", ["int4-weights", "fp8-minmax"])
def test_presets_lead_to_an_engine(
    wide: tuple[Path, Artifact], preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = wide
    checkpoint = calibrate(
        model, tmp_path / "c", recipe=preset, method="minmax", effort="fast", calibration=data
    )
    assert isinstance(checkpoint, Artifact)
    left = checkpoint.facts.left_in_float or {}
    if preset == "int4-weights":
        (reason,) = (reason for reason in left if "convolution" in reason)
        assert all("conv" in path for path in left[reason])
        said = capsys.readouterr()
        assert reason in said.out + said.err
    bundle = export(checkpoint, tmp_path / "onnx")
    assert lint(graph_file(bundle.path)).passed
    if preset == "fp8-minmax":
        with pytest.raises(CapabilityError, match=r"no kernels for fp8: build with --backend .*onnxruntime"):
            build_engine(bundle, tmp_path / "engine", backend="openvino")
    engine = build_engine(bundle, tmp_path / "engine", backend="onnxruntime")
    network = load_checkpoint(checkpoint)
    inputs = data_inputs(data)
    with load_engine(engine) as loaded, torch.no_grad():
        rows = [{name: x[row : row + 1] for name, x in inputs.items()} for row in range(8)]
        pairs = [(denoise(network, row), loaded(row)) for row in rows]
    assert median(sqnr_db(simulated, computed) for simulated, computed in pairs) >= 45


def data_inputs(data: Artifact) -> dict[str, Tensor]:
    from qdeploy.calibration_set.dataset import CalibrationSet

    return CalibrationSet.open(data.path).inputs(range(8))


def test_a_model_without_a_layer_that_fits_is_refused(ddpm: Path, qdeploy: Any, tmp_path: Path) -> None:
    data = collect(ddpm, tmp_path / "set", samples=2, keep=2, steps=4, scheduler="ddim")
    assert isinstance(data, Artifact)
    with pytest.raises(UsageError, match=r"nothing would be quantized: .*no whole blocks of 64"):
        calibrate(ddpm, tmp_path / "c", recipe="int4-weights", calibration=data)
    result: Result = qdeploy(
        "calibrate", ddpm, "-o", tmp_path / "c", "--recipe", "int4-weights", "--calibration", data.path
    )
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
