"""GGUF files: the ggml project's own reader and diffusers find in them what was calibrated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import gguf
import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qdeploy as qd
from qdeploy.export.gguf import BLOCK, pack
from qdeploy.model.inputs import denoise_rows
from qdeploy.quant.layer import quantized_layers
from qdeploy.store.artifact import CalibrationFolder, Checkpoint
from qdeploy.store.probe import PROBE
from qdeploy.system.decibels import sqnr_db
from qdeploy.system.errors import CapabilityError, InvalidInputError
from tests.models import flux_folder


def dequantized(kind: str, data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([3, 4, 5, 8]), zero=st.booleans())
def test_ggmls_own_reader_finds_the_numbers_that_the_codes_stand_for(
    seed: int, bits: int, zero: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    asymmetric = zero and bits <= 4
    low, high = (0, 2**bits) if asymmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (5, 3, BLOCK), generator=generator)
    scale = (torch.rand(5, 3, generator=generator) + 0.01).half().float()
    zeros = torch.randint(1, 2**bits, (5, 3), generator=generator) if asymmetric else torch.zeros(5, 3).int()
    packed = pack(codes, scale, zeros, bits)
    assert packed is not None
    assert packed[0] == ("Q4_1" if asymmetric else "Q4_0" if bits <= 4 else "Q8_0")
    right = ((codes - zeros.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    found = dequantized(*packed)
    # The value of code 0 is rounded to half precision where there is a zero point; all else is exact.
    assert torch.allclose(found, right, atol=float(right.abs().max()) * 2**-10 if asymmetric else 0, rtol=0)


def test_a_scale_that_half_precision_cannot_hold_is_not_packed() -> None:
    codes = torch.zeros(1, 1, BLOCK, dtype=torch.int32)
    for scale in (1e-9, 1e9):
        assert pack(codes, torch.full((1, 1), scale), torch.zeros(1, 1).int(), 4) is None


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_folder(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def calls(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationFolder:
    place = tmp_path_factory.mktemp("flux") / "set"
    return qd.collect(flux, place, keep=2, samples=2, steps=2, prompts=["a cat", "two dogs"])


@pytest.fixture(scope="module")
def blocks(flux: Path, calls: CalibrationFolder, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp("flux") / "w4"
    return qd.calibrate(flux, place, recipe="w4-blocks", weights="int4b32", calibration=calls)


@pytest.mark.parametrize(("weights", "kind"), [("int4b32", "Q4_0"), ("int8b32", "Q8_0"), ("uint4", "Q4_1")])
def test_diffusers_loads_the_file_and_computes_what_was_calibrated(
    weights: str, kind: str, flux: Path, calls: CalibrationFolder, tmp_path: Path
) -> None:
    recipe = qd.Recipe(
        stages=[qd.WeightRanges("minmax")], weights=weights, activations="none", target="openvino"
    )
    checkpoint = qd.calibrate(flux, tmp_path / "w", recipe=recipe, calibration=calls)
    written = qd.export_gguf(checkpoint, tmp_path / "w.gguf")
    assert written.tensors[kind] >= 3
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(written.path),
        config=str(flux),
        subfolder="transformer",
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    simulated = qd.load_checkpoint(checkpoint)
    layers = quantized_layers(simulated)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    for path, layer in layers.items():
        tensor = reader[f"{path}.weight"]
        if tensor.tensor_type.name == kind:
            right = torch.cat(layer.quantized_weights(), 1)
            assert sqnr_db(dequantized(kind, tensor.data), right) > 60, path
    probe = load_file(checkpoint.file(PROBE))
    inputs = {
        name.removeprefix("input."): value for name, value in probe.items() if name.startswith("input.")
    }
    with torch.no_grad():
        found = denoise_rows(loaded.eval(), inputs)
    nearness = sqnr_db(found, probe["simulated"])
    assert nearness > 55  # scales and float layers are rounded to half precision
    if kind != "Q8_0":
        assert (
            sqnr_db(found, probe["reference"]) < nearness - 6
        )  # so the rounding of the calibration is in the file


def test_the_command_says_what_is_in_the_file(
    blocks: Checkpoint, qdeploy: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "w4.gguf"
    done = qdeploy("export-gguf", blocks.path, "-o", file)
    assert done.exit_code == 0, done.stderr
    assert "Q4_0" in done.stdout
    assert [each.name for each in file.parent.iterdir()] == ["w4.gguf"]
    again = qdeploy("export-gguf", blocks.path, "-o", file)
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert qdeploy("export-gguf", blocks.path, "-o", file, "--overwrite").exit_code == 0
    wrong = qdeploy("export-gguf", blocks.path, "-o", tmp_path / "w4.safetensors")
    assert (wrong.exit_code, "is named *.gguf" in wrong.stderr) == (2, True)


def test_a_layer_whose_input_is_changed_is_refused_by_name(
    flux: Path, calls: CalibrationFolder, tmp_path: Path
) -> None:
    rotated = qd.calibrate(
        flux, tmp_path / "w4", recipe="w4-blocks", weights="int4b32", calibration=calls,
        stages=[qd.Rotate(), qd.WeightRanges("minmax"), qd.ActivationRanges("minmax")], effort="fast",
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match=r"the layer \S+ has rotated inputs"):
        qd.export_gguf(rotated, tmp_path / "w4.gguf")
    assert not (tmp_path / "w4.gguf").exists()


def test_without_the_package_its_extra_is_named(
    blocks: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CapabilityError, match=r"pip install 'qdeploy\[gguf\]'"):
        qd.export_gguf(blocks, tmp_path / "w4.gguf")
