"""An engine that computes garbage is refused with the layer that makes it, unless it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from qdeploy.engines.build import build_engine
from qdeploy.engines.floor import LEAST_PARITY, LEAST_SQNR, shortfall
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import CheckFailed
from tests.engines.bundles import expected, write_bundle
from tests.helpers import reseal


def coarse(folder: Path, name: str, factor: float) -> Artifact:
    """A bundle calibrated with garbage: one scale is too large by a factor, and the probe knows it."""
    made = write_bundle(folder)
    file = made.path / "unet" / "model.onnx"
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        if tensor.name == name:
            scale = numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(scale, name))
    onnx.save(graph, file)
    probe = load_file(made.path / "probe.safetensors")
    inputs = {key.removeprefix("input."): x for key, x in probe.items() if key.startswith("input.")}
    probe["simulated"] = expected(graph, inputs)
    save_file(probe, made.path / "probe.safetensors")
    reseal(made.path)
    return made


def scales(graph: Path) -> list[str]:
    return [tensor.name for tensor in onnx.load(graph).graph.initializer if tensor.name.endswith(".scale")]


def test_garbage_is_refused_with_its_layer(tmp_path: Path, qdeploy: Callable[..., Result]) -> None:
    name = next(name for name in scales(write_bundle(tmp_path / "ok").path / "unet" / "model.onnx"))
    bundle = coarse(tmp_path / "onnx", name, 1e5)
    refused = qdeploy("build-engine", bundle.path, "-o", tmp_path / "engine", "--threads", 1)
    assert refused.exit_code == 3, refused.output
    assert "6 is the least; most is lost in body." in refused.output
    assert not (tmp_path / "engine").exists()
    kept = qdeploy(
        "build-engine", bundle.path, "-o", tmp_path / "engine", "--threads", 1, "--allow-inaccurate"
    )
    assert kept.exit_code == 0
    assert "warning: its SQNR to full precision" in kept.output


def test_an_engine_of_another_function_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "onnx", simulated=torch.randn(4, 3, 6, 6))
    with pytest.raises(
        CheckFailed, match="dB from the model that was calibrated, so it computes something else"
    ):
        # The claimed output is far from full precision too, so that noise alone would excuse the engine.
        build_engine(bundle, tmp_path / "engine", threads=1)
    assert not (tmp_path / "engine").exists()


def test_the_floors_are_where_they_are_said_to_be() -> None:
    reference = torch.randn(4, 1000, dtype=torch.float64)
    noise = torch.randn(4, 1000, dtype=torch.float64)
    noise *= reference.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)

    def at(db: float) -> torch.Tensor:
        return reference + noise * 10 ** (-db / 20)

    assert shortfall(at(LEAST_PARITY + 0.1), reference, None) is None
    assert "in full precision, so it" in (shortfall(at(LEAST_PARITY - 0.1), reference, None) or "")
    assert shortfall(at(LEAST_SQNR + 0.1), reference, at(LEAST_SQNR + 0.1)) is None
    assert "6 is the least" in (shortfall(at(LEAST_SQNR - 0.1), reference, at(LEAST_SQNR - 0.1)) or "")
    assert "was calibrated" in (shortfall(at(10), reference, at(30)) or "")
