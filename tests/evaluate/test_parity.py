"""Parity is kept by what computes the same function, and lost by whatever does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qdeploy.engines.build import build_engine
from qdeploy.evaluate.check import check
from qdeploy.evaluate.parity import RunnableArtifact, measure_parity, open_subject, rounding_floors
from qdeploy.evaluate.thresholds import parity_floor, rows_out_of_parity
from qdeploy.store.artifact import Artifact, Bundle
from qdeploy.store.builder import Draft
from qdeploy.system.decibels import distance
from qdeploy.system.errors import InvalidInputError
from tests.evaluate.conftest import Way

Edit = Callable[[dict[str, np.ndarray]], None]


def edited(bundle: Artifact, folder: Path, edit: Edit) -> Artifact:
    """A copy of a bundle with other initializers, and with the probe of the original."""
    with Draft(folder, Bundle, bundle.made_from, options={"edited": str(folder)}) as draft:
        shutil.copytree(bundle.path, draft.content, dirs_exist_ok=True)
        file = draft.content / "unet" / "model.onnx"
        graph = onnx.load(file)
        values = {x.name: numpy_helper.to_array(x).copy() for x in graph.graph.initializer}
        edit(values)
        for tensor in graph.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
        onnx.save(graph, file)
        return draft.finish(facts=bundle.facts, notes=bundle.manifest.notes)


def codes_of_a_convolution(values: dict[str, np.ndarray]) -> np.ndarray:
    """The largest int8 weight of the graph."""
    return max((x for x in values.values() if x.dtype == np.int8 and x.ndim == 4), key=lambda x: x.size)


def flip_a_channel(values: dict[str, np.ndarray]) -> None:
    codes = codes_of_a_convolution(values)
    codes[0] = -codes[0]


def shift_codes(values: dict[str, np.ndarray]) -> None:
    codes = codes_of_a_convolution(values)
    codes[:] = np.clip(codes.astype(int) + 8, -127, 127)


def stretch_scales(values: dict[str, np.ndarray]) -> None:
    """Scales of activations, all by a tenth."""
    for name, value in values.items():
        if value.dtype == np.float32 and value.ndim == 0 and "scale" in name:
            values[name] = (value * 1.1).astype(np.float32)


def test_every_stage_computes_the_probe(way: Way) -> None:
    for artifact in (way.checkpoint, way.onnx, way.engine):
        measured = measure_parity(open_subject(artifact))
        assert measured["expected"] == "simulated"
        assert measured["sqnr_db"] >= parity_floor(measured)
        assert not list(rows_out_of_parity(measured))


def test_the_fake_quantized_model_is_found_again_bit_by_bit(way: Way) -> None:
    measured = measure_parity(open_subject(way.checkpoint))
    assert measured["max_abs"] == 0
    assert measured["same_rows"] == 1
    assert measured["sqnr_db"] == 200
    assert measured["backend"] == "torch"


def test_pairs_run_from_the_simulation_to_the_engine(way: Way) -> None:
    engine, bundle, checkpoint = (open_subject(a) for a in (way.engine, way.onnx, way.checkpoint))
    pairs = measure_parity(engine, [bundle, checkpoint])["pairs"]
    assert list(pairs) == ["fake-quant vs onnx", "fake-quant vs engine", "onnx vs engine"]
    assert all(pair["sqnr_db"] > 30 for pair in pairs.values())


def test_the_rounding_floor_bounds_what_two_correct_engines_differ_by(way: Way) -> None:
    """It is as far off as rounding puts it, not as far as the nudge does: that is 60 dB."""
    measured = measure_parity(open_subject(way.engine))
    assert measured["simulated_db"] - 6 < measured["rounding_floor_db"] < 58


def test_a_row_that_keeps_all_its_codes_is_moved_further(way: Way) -> None:
    """A row that is small beside the step has no floor at all where nothing is rounded elsewhere."""
    rows = torch.tensor([[100.49, 3.0, 7.0], [0.495, 1.0, 0.2], [0.0, 0.0, 0.0]])
    artifact, idle = way.onnx, torch.nn.Identity()
    subject = RunnableArtifact(artifact, idle, lambda inputs: inputs["sample"].round(), "sample", "torch")
    floors = rounding_floors(subject, {"sample": rows, "timestep": torch.arange(3)}, rows.round())
    assert floors == pytest.approx([40, 0, 200], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("edit", [flip_a_channel, shift_codes, stretch_scales])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_broken_engine_is_found(way: Way, tmp_path: Path, edit: Edit, backend: str) -> None:
    bundle = edited(way.onnx, tmp_path / "broken-onnx", edit)
    engine = build_engine(bundle, tmp_path / "broken", backend=backend, threads=1, allow_inaccurate=True)
    result = check(engine)
    assert not result.passed
    assert any("parity" in failure for failure in result.failures)


def test_an_untouched_copy_passes(way: Way, tmp_path: Path) -> None:
    assert check(edited(way.onnx, tmp_path / "copy", lambda values: None)).passed


def test_a_stage_of_another_way_is_refused(way: Way, tmp_path: Path) -> None:
    stranger = open_subject(edited(way.onnx, tmp_path / "other", flip_a_channel))
    with pytest.raises(InvalidInputError, match="was not made from"):
        measure_parity(open_subject(way.engine), [stranger])
    with pytest.raises(InvalidInputError, match="no pair"):
        measure_parity(open_subject(way.engine), [open_subject(way.engine)])


def test_distance_tells_rows_apart() -> None:
    expected = torch.ones(4, 10)
    output = expected * torch.tensor([1.0, 1.01, 1.1, 1.0])[:, None]
    told = distance(output, expected)
    assert told["sqnr_db"] == pytest.approx(120, abs=0.1)
    assert told["worst_db"] == pytest.approx(20, abs=0.01)
    assert told["same_rows"] == 0.5
    assert told["max_abs"] == pytest.approx(0.1, abs=1e-6)
