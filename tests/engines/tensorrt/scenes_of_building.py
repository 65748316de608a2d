"""The builder, executed through the real bindings over the recording library."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import tensorrt as trt

from qdeploy.engines.tensorrt import builder as building
from qdeploy.engines.tensorrt.child import Built, built_from
from qdeploy.engines.tensorrt.logger import logger_of
from qdeploy.engines.tensorrt.plan import TRUST
from qdeploy.engines.tensorrt.progress import monitor_class
from qdeploy.engines.tensorrt.worker import BuildRequest, serve
from tests.engines.tensorrt.bench import ADA, write_graph
from tests.engines.tensorrt.stage import build, in_order, library, refused, scratch

PARSER_GONE = "Parser.7"  # its destructor's slot


def build_here(request: BuildRequest, folder: Path) -> Built:
    return built_from(serve(request, folder), folder, 0.0)


def whole(folder: Path, failure: str = "", **build_options: Any) -> dict[str, Any]:
    """Build from a file, as the command line does; the GPU is the only thing that is made up."""
    write_graph(folder / "model.onnx")
    with (
        mock.patch.object(building, "require_gpu", return_value=ADA),
        mock.patch.object(building, "build_in_child", build_here),  # failures are played in this process
        library.failing(failure),
    ):
        building.build(folder / "model.onnx", folder / "engine", **build_options)
    return json.loads((folder / "engine" / "plan.json").read_text())


def scene_a_build_calls_everything_in_order() -> None:
    assert build() == b"PLAN made by a fake"
    in_order(
        "+Builder",
        "Builder.createNetwork 1",
        "+Config",
        "+Parser",
        "Parser.parseFromFile /model.onnx",
        "Config.setProfilingVerbosity 2",
        "Config.setMaxAuxStreams 0",
        "Config.setFlag 6",
        "Profile.setDimensions sample 0 1x4x8x8",
        "Profile.setDimensions sample 1 2x4x8x8",
        "Profile.setDimensions sample 2 4x4x8x8",
        "Config.addOptimizationProfile",
        "Builder.build Network Config",
    )


def scene_the_parser_outlives_the_build() -> None:
    build()
    gone = [index for index, line in enumerate(library.journal) if line.startswith(PARSER_GONE)]
    assert gone
    assert gone[0] > library.journal.index("Builder.build Network Config"), library.journal
    assert library.journal.index("~Network") > library.journal.index("Builder.build Network Config")


def scene_every_wish_reaches_the_configuration() -> None:
    build(workspace=1.5, optimization_level=4, refit=True, hardware_compatible=True)
    for line in (
        f"Config.setMemoryPoolLimit 0 {3 * 2**29}",
        "Config.setBuilderOptimizationLevel 4",
        "Config.setFlag 4",
        "Config.setHardwareCompatibilityLevel 1",
    ):
        assert line in library.journal, (line, library.journal)
    build(weight_streaming=True, version_compatible=True)
    assert {"Config.setFlag 20", "Config.setFlag 12"} <= set(library.journal)
    build(strip_plan=True)
    assert "Config.setFlag 18" in library.journal
    build()
    assert not any(
        line.startswith(("Config.setMemoryPool", "Config.setHardware")) for line in library.journal
    )


def scene_no_plan_is_an_error_with_the_reason() -> None:
    refused(lambda: build("no plan"), "cannot build", "no tactic for node body.conv")


def scene_a_refused_graph_names_the_node() -> None:
    refused(lambda: build("parse"), "node 3 'body.mystery' (Mystery)", "no importer", "UNSUPPORTED_NODE")
    assert not any(line.startswith("Builder.build") for line in library.journal)


def scene_a_refused_profile_is_an_error() -> None:
    refused(lambda: build("invalid profile"), "profile 0", "1x4x8x8")
    assert "Config.addOptimizationProfile" not in library.journal
    refused(lambda: build("bad profile"), "profile 0")


def scene_a_network_of_other_types_is_refused() -> None:
    refused(lambda: build("half input"), "'sample' is float32", "float16")
    refused(lambda: build("wrong type"), "'timestep'", "int64")


def scene_a_library_without_a_gpu_is_a_missing_capability() -> None:
    refused(lambda: build("no builder"), "cannot start", code=4)
    refused(lambda: build("no network"), "cannot start", code=4)


def scene_the_timing_cache_is_loaded_merged_and_kept() -> None:
    place = scratch / "cache"
    place.mkdir()
    build(timing_cache=place)
    (kept,) = place.glob("*.timing")
    assert kept.read_bytes() == b"timings"
    assert "sm89" in kept.name
    assert "11.4.0.106" in kept.name
    assert "Config.createTimingCache 0" in library.journal
    in_order("Config.setTimingCache 0", "Builder.build", "+CacheMemory")
    build(timing_cache=place)
    in_order(
        "Config.createTimingCache 7", "Config.setTimingCache 0", "Builder.build", "TimingCache.combine 0"
    )
    build("foreign cache", timing_cache=place)
    in_order(
        "Config.createTimingCache 7",
        "Config.setTimingCache",
        "Config.createTimingCache 0",
        "Config.setTimingCache",
    )


def scene_the_logger_lives_as_long_as_the_process() -> None:
    build()
    logger = weakref.ref(logger_of(trt))
    gc.collect()
    assert logger() is not None
    assert logger_of(trt) is logger()
    logger().log("a severity that is none", None)  # must not raise into TensorRT


def scene_progress_can_be_watched_and_stopped() -> None:
    monitor = monitor_class(trt)()
    with library.failing():
        config = trt.Builder(logger_of(trt)).create_builder_config()
        config.progress_monitor = monitor
        assert "Config.setProgressMonitor 1" in library.journal
    monitor.phase_start("Building", None, 3)
    assert monitor.step_complete("Building", 0) is True
    monitor.stopped = True
    assert monitor.step_complete("Building", 1) is False
    monitor.phase_finish("Building")
    monitor.close()


def scene_a_whole_build_leaves_a_plan_with_its_facts() -> None:
    sidecar = whole(scratch.path, batch=3)
    assert (scratch / "engine" / "model.plan").read_bytes() == b"PLAN made by a fake"
    assert sidecar["tensorrt"] == "11.4.0.106"
    assert sidecar["gpu"]["capability"] == "8.9"
    assert sidecar["profiles"] == "sample:1x4x8x8,3x4x8x8,6x4x8x8"
    assert sidecar["plan_bytes"] == 19
    layers = json.loads((scratch / "engine" / "layers.json").read_text())
    assert layers["layers"][0]["Name"] == "body.conv"
    assert layers["bytes"] == {"activations": 6000, "weights": 5000}
    in_order(
        "Builder.build", "Runtime.deserialize 19", "Inspector.getEngineInformation 1", "~Engine", "~Runtime"
    )


def scene_a_stripped_build_keeps_the_weights_of_the_half_graph() -> None:
    whole(scratch.path, precision="f16", strip_plan=True)
    kept = onnx.load(scratch / "engine" / "weights" / "model.onnx")
    assert [tensor.data_type for tensor in kept.graph.initializer] == [onnx.TensorProto.FLOAT16]
    in_order("Builder.build", "Runtime.deserialize", "ParserRefitter.refitFromFile model.onnx")


def scene_a_build_that_fails_leaves_no_plan() -> None:
    refused(lambda: whole(scratch.path, "no plan"), "no tactic")
    assert not (scratch / "engine" / "model.plan").exists()


def scene_bad_shapes_are_refused_before_any_library() -> None:
    with library.failing():
        refused(lambda: whole(scratch.path, shapes="latents:1x4x8x8"), "latents", code=2)
        assert library.journal == []


def scene_code_in_a_plan_is_trusted_before_the_build() -> None:
    with library.failing():
        refused(lambda: whole(scratch.path, version_compatible=True), TRUST, code=4)
        assert library.journal == []
