from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.measure import int8_shares, row_by_row
from qdeploy.export.lower import PASSES
from qdeploy.store.artifact import Artifact, EngineFolder, open_artifact
from qdeploy.store.measured import MachineMeasured
from qdeploy.store.probe import read_probe
from qdeploy.system import machine
from qdeploy.system.decibels import distance
from qdeploy.system.errors import CapabilityError, InvalidInputError, QDeployError, UsageError
from tests.engines.bundles import example_inputs, write_bundle
from tests.helpers import pretend_processor


def test_quantized_layers_run_on_int8_kernels_of_openvino(quantized_bundle: Artifact, tmp_path: Path) -> None:
    artifact = build_engine(quantized_bundle, tmp_path / "engine", threads=1)
    assert artifact.facts.backend == "openvino"  # what auto takes here
    assert artifact.measured.int8_mac_share_of_meant == 1.0
    assert 0.5 < artifact.measured.int8_mac_share < 1.0  # conv_in and conv_out stay float
    with load_engine(artifact) as engine:
        kernels = {layer: kernel for kernel in engine.kernels(example_inputs(1)) for layer in kernel.layers}
        assert int8_shares(engine, example_inputs(2))["int8_mac_share_of_meant"] == 1.0
    assert kernels["body.conv"].type.lower().endswith("_i8")
    assert kernels["body.linear"].precision == "int8"
    assert kernels["conv_in"].precision == "f32"


def test_a_float_graph_has_no_int8_share(float_bundle: Artifact, tmp_path: Path) -> None:
    measured = build_engine(float_bundle, tmp_path / "engine", threads=1).measured
    assert measured.int8_mac_share == 0.0
    assert measured.int8_mac_share_of_meant == 1.0
    assert measured.parity.sqnr_db > 100


def test_onnxruntime_tells_which_layers_it_ran_in_float(
    quantized_bundle: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = build_engine(quantized_bundle, tmp_path / "engine", backend="onnxruntime", threads=1)
    with load_engine(artifact) as engine:
        kinds = {
            layer: kernel.kind for kernel in engine.kernels(example_inputs(1)) for layer in kernel.layers
        }
    assert kinds["body.linear"] == "MatMulIntegerToFloat"
    assert 0 < artifact.measured.int8_mac_share_of_meant < 0.9
    assert "in float, first body.conv" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("concat", [False, True])
def test_an_engine_is_the_model_that_was_calibrated(tmp_path: Path, backend: str, concat: bool) -> None:
    # With a Concat that only the quantizer reads, OpenVINO 2026.4 left to itself is 10 dB from the truth.
    bundle = write_bundle(tmp_path / "onnx", concat=concat)
    measured = build_engine(bundle, tmp_path / "engine", backend=backend, threads=1).measured
    assert measured.parity.sqnr_db > 100
    assert measured.parity.max_abs < 1e-4


def test_the_manifest_says_what_was_built_and_measured(
    engine_folder: Path, quantized_bundle: Artifact
) -> None:
    artifact = open_artifact(engine_folder, EngineFolder)
    assert artifact.made_from["onnx"] == quantized_bundle.sha256
    assert artifact.manifest.notes.source == quantized_bundle.manifest.notes.source
    for name in ("component", "class_name", "model_sha256", "precision", "weights", "activations", "target"):
        assert getattr(artifact.facts, name) == getattr(quantized_bundle.facts, name)
    assert artifact.facts.engine_precision == "f32"
    measured = artifact.measured
    assert 0 < measured.ms.median <= measured.ms.p95
    assert measured.size_mb > 0
    assert measured.load_seconds > 0
    assert measured.machine == MachineMeasured(**machine.machine())
    assert {"unet/config.json", "probe.safetensors", "macs.json"} <= artifact.files.keys()
    json.dumps(msgspec.to_builtins(artifact.manifest), allow_nan=False)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_equal_bundles_make_equal_engines_in_any_process(
    quantized_bundle: Artifact, tmp_path: Path, backend: str
) -> None:
    program = (
        "import sys; from qdeploy.engines.build import build_engine; "
        "print(build_engine(sys.argv[1], sys.argv[2], backend=sys.argv[3], threads=1).sha256)"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(quantized_bundle.path), str(tmp_path / "0"), backend],
        capture_output=True,
        text=True,
        check=True,
    )
    here = [build_engine(quantized_bundle, tmp_path / n, backend=backend, threads=1).sha256 for n in "12"]
    assert {*here, other.stdout.strip()} == {here[0]}


def test_the_same_request_is_carried_out_once(quantized_bundle: Artifact, tmp_path: Path) -> None:
    first = build_engine(quantized_bundle, tmp_path / "engine", threads=1)
    again = build_engine(quantized_bundle, tmp_path / "engine", threads=1)
    assert again.manifest == first.manifest
    with pytest.raises(UsageError, match="--overwrite"):
        build_engine(quantized_bundle, tmp_path / "engine", threads=1, batch=2)
    replaced = build_engine(quantized_bundle, tmp_path / "engine", threads=1, batch=2, overwrite=True)
    assert replaced.facts.batch == 2


@pytest.mark.skipif(not machine.has_bf16(), reason="the processor has no bf16 instructions")
def test_bf16_is_near_and_leaves_int8_layers_as_they_are(quantized_bundle: Artifact, tmp_path: Path) -> None:
    artifact = build_engine(quantized_bundle, tmp_path / "engine", precision="bf16", threads=1)
    assert artifact.facts.engine_precision == "bf16"
    assert artifact.facts.precision == "W8A8"
    assert artifact.measured.int8_mac_share_of_meant == 1.0
    assert 25 < artifact.measured.parity.sqnr_db < 80
    with load_engine(artifact) as engine:
        kernels = {layer: kernel for kernel in engine.kernels(example_inputs(1)) for layer in kernel.layers}
        assert engine(example_inputs(1)).dtype == torch.float32
    assert kernels["conv_in"].precision == "bf16"


# -- refusals ----------------------------------------------------------------------------------------------


def exit_code(error: pytest.ExceptionInfo[QDeployError]) -> int:
    assert "\n" not in str(error.value)
    return error.value.exit_code


def test_a_simulation_is_refused_with_the_reason(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "onnx", facts={"simulated": ["activations of 6 bits"]})
    with pytest.raises(CapabilityError, match="activations of 6 bits") as error:
        build_engine(bundle, tmp_path / "engine")
    assert exit_code(error) == 4
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_operation_that_the_backend_lacks_is_named(tmp_path: Path, backend: str) -> None:
    bundle = write_bundle(tmp_path / "onnx", unknown=True)
    with pytest.raises(InvalidInputError, match="Mystery") as error:
        build_engine(bundle, tmp_path / "engine", backend=backend)
    assert exit_code(error) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx"]  # nothing is left behind


def test_openvino_names_the_node_too(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"body\.mystery"):
        build_engine(write_bundle(tmp_path / "onnx", unknown=True), tmp_path / "engine", backend="openvino")


def test_a_damaged_bundle_and_a_damaged_engine_are_refused(
    quantized_bundle: Artifact, tmp_path: Path
) -> None:
    shutil.copytree(quantized_bundle.path, tmp_path / "onnx")
    build_engine(tmp_path / "onnx", tmp_path / "engine", threads=1)
    for victim in ("onnx/unet/model.onnx", "engine/unet/openvino_model.bin"):
        data = bytearray((tmp_path / victim).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / victim).write_bytes(data)
    with pytest.raises(InvalidInputError, match=r"model\.onnx") as error:
        build_engine(tmp_path / "onnx", tmp_path / "other")
    assert exit_code(error) == 5
    with pytest.raises(InvalidInputError, match=r"openvino_model\.bin") as error:
        load_engine(tmp_path / "engine")
    assert exit_code(error) == 5


def test_what_is_no_bundle_is_refused(engine_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'engine'"):
        build_engine(engine_folder, tmp_path / "engine")
    with pytest.raises(InvalidInputError, match="does not exist"):
        load_engine(tmp_path / "engine")


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"threads": 0}, {"precision": "fp8"}, {"backend": "magic"}])
def test_impossible_wishes_are_usage_errors(quantized_bundle: Artifact, tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UsageError) as error:
        build_engine(quantized_bundle, tmp_path / "engine", **wrong)
    assert exit_code(error) == 2


def test_bf16_needs_a_processor_and_a_backend_that_have_it(
    quantized_bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapabilityError, match="onnxruntime computes in f32 only"):
        build_engine(quantized_bundle, tmp_path / "engine", backend="onnxruntime", precision="bf16")
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512_vnni")
    with pytest.raises(CapabilityError, match="avx512_bf16") as error:
        build_engine(quantized_bundle, tmp_path / "engine", precision="bf16")
    assert exit_code(error) == 4


def test_a_bf16_engine_is_refused_where_it_cannot_run(
    quantized_bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not machine.has_bf16():
        pytest.skip("the processor has no bf16 instructions")
    artifact = build_engine(quantized_bundle, tmp_path / "engine", precision="bf16", threads=1)
    pretend_processor(monkeypatch, tmp_path, "avx2")
    with pytest.raises(CapabilityError, match="bf16"):
        load_engine(artifact)


# -- warnings ----------------------------------------------------------------------------------------------


def test_a_processor_without_int8_instructions_is_told(
    quantized_bundle: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512f")
    build_engine(quantized_bundle, tmp_path / "engine", threads=1)
    assert "neither VNNI nor AMX" in capsys.readouterr().err


def test_weights_of_eight_bits_are_right_without_vnni(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this processor and as on one without VNNI; seven bits run in int8 on both."""
    wide, narrow = (write_bundle(tmp_path / f"onnx{limit}", limit=limit) for limit in (127, 63))
    here = build_engine(wide, tmp_path / "here", threads=1)
    assert here.facts.int8_sums == (machine.NARROW if machine.int8_sums_saturate() else machine.WIDE)
    assert here.measured.parity.sqnr_db > 100
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512f")
    capsys.readouterr()
    floats = build_engine(wide, tmp_path / "floats", threads=1)
    assert "2 layers with 8-bit weights are computed in floats" in capsys.readouterr().err
    assert floats.facts.int8_sums == machine.NARROW
    assert floats.measured.int8_mac_share == 0
    assert floats.measured.parity.sqnr_db > 100
    seven = build_engine(narrow, tmp_path / "seven", threads=1)
    assert "in floats" not in capsys.readouterr().err
    assert seven.measured.int8_mac_share_of_meant == 1
    assert seven.measured.parity.sqnr_db > 100


def test_an_engine_with_wide_sums_is_refused_where_they_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512_vnni")
    # Where this machine itself saturates, the engine of the wider codes is below the floor.
    engines = [
        build_engine(
            write_bundle(tmp_path / f"onnx{n}", limit=n), tmp_path / f"e{n}", threads=1, allow_inaccurate=True
        )
        for n in (127, 63)
    ]
    pretend_processor(monkeypatch, tmp_path, "avx2")
    with pytest.raises(CapabilityError, match=r"no VNNI.*int7") as error:
        load_engine(engines[0])
    assert exit_code(error) == 4
    load_engine(engines[1]).close()
    with pytest.raises(UsageError, match="--overwrite"):  # what lies there was made for another processor
        build_engine(tmp_path / "onnx127", tmp_path / "e127", threads=1)


def test_an_engine_that_computes_something_else_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "onnx")
    from safetensors.torch import load_file

    probe = load_file(bundle.file("probe.safetensors"))
    bundle = write_bundle(tmp_path / "onnx2", simulated=probe["reference"])
    build_engine(bundle, tmp_path / "engine", threads=1)
    assert "report this" in capsys.readouterr().err


def test_products_stay_exact_on_processors_whose_byte_products_saturate(
    quantized_bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without VNNI ONNX Runtime makes the weights unsigned too; the dialect's products still load, and agree."""
    bundle = write_bundle(tmp_path / "onnx", facts={"target": "onnxruntime"}, passes=PASSES["onnxruntime"])
    plain = build_engine(bundle, tmp_path / "engine", backend="onnxruntime", threads=1)
    assert plain.measured.int8_mac_share_of_meant == 1.0
    assert plain.measured.parity.sqnr_db > 100
    pretend_processor(monkeypatch, tmp_path, "avx2")
    with load_engine(plain) as engine:
        kinds = {kernel.kind for kernel in engine.kernels(example_inputs(1))}
        inputs, _, simulated = read_probe(plain.path)
        assert simulated is not None
        assert distance(row_by_row(engine, inputs), simulated)["sqnr_db"] > 100
    assert "MatMulIntegerToFloat" in kinds
