"""Polygraphy as a second builder: the same graph, another tool's configuration, the same layers in the plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdeploy.engines.tensorrt.child import build_in_child
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.inspector import dtype
from qdeploy.engines.tensorrt.layer_log import BEGINNING, parse_layer_log
from qdeploy.engines.tensorrt.options import Options
from qdeploy.engines.tensorrt.worker import BuildRequest
from qdeploy.export.lint.run import graph_file
from qdeploy.store.artifact import Artifact
from tests.engines.tensorrt.real_builds import int4_linear, quantized_conv

SHAPES = {"conv": "[2,32,8,8]", "int4": "[2,16,128]"}


def by_polygraphy(graph: Path, folder: Path, shape: str) -> list[dict[str, Any]]:
    """The layers that Polygraphy's build logs."""
    sizes = [part for which in ("min", "opt", "max") for part in (f"--trt-{which}-shapes", f"sample:{shape}")]
    command = [
        str(Path(sys.executable).with_name("polygraphy")), "convert", str(graph), "--convert-to", "trt",
        "--compute-capabilities", "8.9", "--profiling-verbosity", "detailed", "-vvvvv", *sizes,
        "-o", str(folder / "polygraphy.plan"),
    ]  # fmt: skip
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    _, _, rest = done.stdout.partition(BEGINNING)
    listed = [line.strip() for line in rest.splitlines() if line.strip().startswith("Name: ")]
    return parse_layer_log("\n".join([BEGINNING, *(line for line in listed if "LayerType: " in line)]))


def by_us(graph: Path, folder: Path, shape: str) -> list[dict[str, Any]]:
    sizes = shape.strip("[]").replace(",", "x")
    request = BuildRequest("tensorrt-rtx", graph, graph, f"sample:{sizes}", Options(), (89,), None)
    work = folder / "work"
    work.mkdir()
    layers = build_in_child(request, work).layers
    assert layers is not None
    return parse_layer_log(layers)


def described(layers: list[dict[str, Any]]) -> list[tuple[str, list[str], list[str]]]:
    """Layers without the numbers in their names: kind and types."""
    return [
        (
            layer["LayerType"],
            [dtype(tensor) for side in ("Inputs", "Constants") for tensor in layer[side]],
            [dtype(tensor) for tensor in layer["Outputs"]],
        )
        for layer in layers
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_both_build_the_same_layers(name: str, tmp_path: Path) -> None:
    write = {"conv": quantized_conv, "int4": int4_linear}[name]
    graph = write(tmp_path / "model.onnx")
    ours, theirs = (build(graph, tmp_path, SHAPES[name]) for build in (by_us, by_polygraphy))
    assert len(ours) > 0
    assert described(ours) == described(theirs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_build_the_same_layers_of_an_exported_bundle(quantized_bundle: Artifact, tmp_path: Path) -> None:
    graph = graph_file(quantized_bundle.path)
    (port,) = (port for port in read_graph(graph).inputs if port.dynamic)
    assert port.name == "sample"
    shape = str([2, *port.shape[1:]]).replace(" ", "")
    ours, theirs = (build(graph, tmp_path, shape) for build in (by_us, by_polygraphy))
    assert len(ours) > 5
    assert described(ours) == described(theirs)
