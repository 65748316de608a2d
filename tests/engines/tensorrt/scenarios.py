"""Our builder and runtime, executed through the real bindings over a recording library.

Run as a program, because mistakes at this border end processes: it prints which scenarios failed, and how many
native calls were recorded. A scenario is a function whose name begins with ``scene``.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import tensorrt as trt  # the shim that the test lays before the bindings

from qdeploy.engines.tensorrt import builder as building
from qdeploy.engines.tensorrt import plan as plans
from qdeploy.engines.tensorrt.execution import Execution
from qdeploy.engines.tensorrt.inspector import read_layers, report
from qdeploy.engines.tensorrt.logger import logger_of
from qdeploy.engines.tensorrt.options import Options
from qdeploy.engines.tensorrt.profiles import parse_shapes
from qdeploy.engines.tensorrt.progress import monitor_class
from qdeploy.errors import QDeployError
from qdeploy.progress import verbosity
from tests.engines.tensorrt.bench import (
    ADA,
    GRAPH,
    SHAPES,
    FakeCuda,
    Library,
    inputs,
    plan_folder,
    write_graph,
)

PARSER_GONE = "Parser.7"  # its destructor's slot

library: Library
scratch: Path


def build(failure: str = "", shapes: str = SHAPES, **options: Any) -> bytes:
    with library.failing(failure):
        plan = building.build_plan(
            trt, Path("model.onnx"), GRAPH, parse_shapes(shapes), Options(**options), ADA
        )
        return bytes(memoryview(plan))


def refused(call: Callable[[], object], *words: str, code: int = 5) -> None:
    """The call ends in one of our errors, which says so; never in a crash or another exception."""
    with pytest.raises(QDeployError) as caught:
        call()
    assert caught.value.exit_code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def in_order(*parts: str, journal: Sequence[str] | None = None) -> None:
    """Lines that begin so occur in this order."""
    lines = iter(library.journal if journal is None else journal)
    for part in parts:
        assert any(line.startswith(part) for line in lines), (
            f"{part!r} is missing or too early: {library.journal}"
        )


def opened(failure: str = "", **change: Any) -> plans.Plan:
    with library.failing(failure):
        return plans.open_plan(trt, plan_folder(scratch / "plan", **change), ADA)


def execution(
    failure: str = "", graphs: bool = False, cuda: FakeCuda | None = None, **change: Any
) -> Execution:
    plan = opened(**change)
    with library.failing(failure):
        return Execution(trt, plan, cuda or FakeCuda(), graphs=graphs)


# -- building ----------------------------------------------------------------------------------------------


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


def whole(folder: Path, failure: str = "", **wishes: Any) -> dict[str, Any]:
    """Build from a file, as the command line does; the GPU is the only thing that is made up."""
    write_graph(folder / "model.onnx")
    with mock.patch.object(building, "require_gpu", return_value=ADA), library.failing(failure):
        building.build(folder / "model.onnx", folder / "engine", **wishes)
    return json.loads((folder / "engine" / "plan.json").read_text())


def scene_a_whole_build_leaves_a_plan_with_its_facts() -> None:
    sidecar = whole(scratch, batch=3)
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
    whole(scratch, precision="f16", strip_plan=True)
    kept = onnx.load(scratch / "engine" / "weights" / "model.onnx")
    assert [tensor.data_type for tensor in kept.graph.initializer] == [onnx.TensorProto.FLOAT16]
    in_order("Builder.build", "Runtime.deserialize", "ParserRefitter.refitFromFile model.onnx")


def scene_a_build_that_fails_leaves_no_plan() -> None:
    refused(lambda: whole(scratch, "no plan"), "no tactic")
    assert not (scratch / "engine" / "model.plan").exists()


def scene_bad_shapes_are_refused_before_any_library() -> None:
    with library.failing():
        refused(lambda: whole(scratch, shapes="latents:1x4x8x8"), "latents", code=2)
        assert library.journal == []


# -- opening -----------------------------------------------------------------------------------------------


def scene_a_plan_is_opened_and_closed_in_order() -> None:
    run = execution()
    with library.failing():
        run.close()
        run.plan.close()
        run.plan = None  # type: ignore[assignment]
        gc.collect()
        destroyed = [line for line in library.journal if line in ("~Context", "~Engine", "~Runtime")]
    assert destroyed == ["~Context", "~Engine", "~Runtime"], destroyed


def scene_a_damaged_plan_is_refused_before_tensorrt_sees_it() -> None:
    whole = plan_folder(scratch / "damaged")
    (whole / "model.plan").write_bytes(b"PLAN of")
    with library.failing():
        refused(lambda: plans.open_plan(trt, whole, ADA), "7 of 14 bytes")
        (whole / "model.plan").write_bytes(b"PLAN of a tess")
        refused(lambda: plans.open_plan(trt, whole, ADA), "not the plan that was built")
        (whole / "plan.json").write_text("{")
        refused(lambda: plans.open_plan(trt, whole, ADA), "build the engine again")
        assert library.journal == []


def scene_a_plan_that_tensorrt_refuses_is_an_error() -> None:
    refused(lambda: opened("bad plan"), "cannot load", "magic tag does not match")


def scene_foreign_plans_are_refused_unless_built_to_travel() -> None:
    turing = ADA.to_json() | {"name": "Other", "capability": "7.5"}
    refused(lambda: opened(gpu=turing), "7.5 (Other)", "has 8.9", code=4)
    opened(gpu=turing, hardware_compatible=True)
    refused(lambda: opened(tensorrt="11.3.0.1"), "11.3.0.1", "11.4.0.106", code=4)
    refused(lambda: opened(tensorrt="11.9.0.1", version_compatible=True), "11.9.0.1", code=4)


def scene_code_in_a_plan_runs_only_when_trusted() -> None:
    import os

    refused(lambda: opened(version_compatible=True), plans.TRUST, code=4)
    refused(lambda: whole(scratch, version_compatible=True), plans.TRUST, code=4)
    assert not any("Runtime.deserialize" in line for line in library.journal)
    os.environ[plans.TRUST] = "1"
    opened(version_compatible=True, tensorrt="11.3.0.1")
    in_order("Runtime.setEngineHostCodeAllowed 1", "Runtime.deserialize")
    del os.environ[plans.TRUST]


def scene_stripped_plans_get_their_weights() -> None:
    opened(strip_plan=True)
    in_order("Runtime.deserialize", "+Refitter", "+ParserRefitter", "ParserRefitter.refitFromFile model.onnx",
             "Refitter.refitCudaEngine")  # fmt: skip
    refused(lambda: opened("refit", strip_plan=True), "cannot take the weights")


def scene_streamed_weights_get_their_budget_before_any_context() -> None:
    plan = opened(weight_streaming=True)
    assert "Engine.setWeightStreamingBudget 4096" in library.journal
    assert "+Context" not in library.journal
    assert Execution(trt, plan, FakeCuda(), graphs=True).graphs is False


def scene_the_inspector_tells_what_runs_in_int8() -> None:
    layers = read_layers(trt, opened().engine)
    told = report(layers, {"body.conv"})
    assert told["as_planned"] == 1, told
    refused(lambda: read_layers(trt, opened("no layers").engine), "inspector")


# -- calling -----------------------------------------------------------------------------------------------


def scene_a_call_keeps_the_order() -> None:
    run = execution()
    with library.failing():
        out = run(inputs())
        in_order(
            "Context.setInputShape sample 2x4x8x8",
            "Context.setInputShape timestep",
            "Context.inferShapes",
            "Context.getTensorShape out_sample",
            "Context.setTensorAddress sample",
            "Context.setTensorAddress timestep",
            "Context.setTensorAddress out_sample",
            "Context.enqueueV3 77",
        )
        assert library.journal[0].startswith("Context.setInputShape"), library.journal
    assert out["out_sample"].shape == (2, 4, 8, 8)
    assert run.cuda.events == ["enter", "leave"]


def scene_shapes_are_set_again_only_when_they_change() -> None:
    run = execution()
    with library.failing():
        first = run(inputs())
        second = run(inputs())
        assert sum(line.startswith("Context.setInputShape") for line in library.journal) == 2
        assert sum(line.startswith("Context.setTensorAddress") for line in library.journal) == 6
        assert first["out_sample"].pointer != second["out_sample"].pointer
        assert run(inputs(4))["out_sample"].shape == (4, 4, 8, 8)
        assert sum(line.startswith("Context.setInputShape") for line in library.journal) == 4


def scene_every_failure_that_is_returned_becomes_an_error() -> None:
    for failure, words in {
        "shape": ("the shape of 'sample'", "dimension out of the profile"),
        "address": ("the address of",),
        "call": ("the call", "illegal memory access"),
        "data dependent": ("'out_sample' depends on data",),
    }.items():
        run = execution()
        with library.failing(failure):
            refused(lambda run=run: run(inputs()), *words)
    refused(lambda: execution("no context"), "cannot run the plan")


def scene_after_a_failure_the_shapes_are_set_anew() -> None:
    run = execution()
    with library.failing("shape"):
        refused(lambda: run(inputs()), "shape")
    with library.failing():
        assert run(inputs())["out_sample"].shape == (2, 4, 8, 8)
        in_order("Context.setInputShape sample", "Context.setInputShape timestep")


def scene_the_profile_follows_the_shapes() -> None:
    two = f"{SHAPES}|sample:8x4x8x8"
    run = execution(profiles=two)
    with library.failing():
        run(inputs(8))
        in_order("Context.setOptimizationProfileAsync 1 77", "Context.setInputShape sample 8x4x8x8")
        run(inputs(2))
        in_order("Context.setOptimizationProfileAsync 1", "Context.setOptimizationProfileAsync 0 77")
    run = execution(profiles=two)
    with library.failing("profile"):
        refused(lambda: run(inputs(8)), "the profile")


def scene_shapes_outside_the_profile_never_reach_tensorrt() -> None:
    run = execution()
    with library.failing():
        refused(lambda: run(inputs(5)), "sample:5x4x8x8", SHAPES, "--shapes")
        assert library.journal == []


def scene_wrong_inputs_are_refused_not_cast() -> None:
    run = execution()
    with library.failing():
        refused(lambda: run(inputs(dtype="torch.float16")), "float32, not as float16")
        refused(lambda: run(inputs(contiguous=False)), "contiguous")
        refused(lambda: run({"sample": inputs()["sample"]}), "'timestep'")
        refused(lambda: run(inputs() | {"labels": inputs()["sample"]}), "'labels'")
        on_cpu = inputs()
        on_cpu["sample"].device.type = "cpu"
        refused(lambda: run(on_cpu), "must lie on the GPU")
        assert library.journal == []
    run = execution("host input")
    with library.failing("host input"):
        refused(lambda: run(inputs()), "machine's memory")


def scene_addresses_are_aligned() -> None:
    run = execution()
    with library.failing():
        run(inputs(pointer=4096 + 64))
        assert "clone" in run.cuda.events
        assert not any("odd" in line for line in library.journal)


def scene_graphs_are_recorded_once_for_each_set_of_shapes() -> None:
    cuda = FakeCuda()
    run = execution(graphs=True, cuda=cuda)
    with library.failing():
        for _ in range(3):
            run(inputs())
        # one call to warm up, one while recording, none afterwards
        assert sum(line.startswith("Context.enqueueV3") for line in library.journal) == 2, library.journal
        assert cuda.events.count("capture") == 1
        assert cuda.events.count("replay") == 3
        in_order("copy", "synchronize", "capture", "copy", "copy", "replay", "clone", journal=cuda.events)
        run(inputs(4))
        assert cuda.events.count("capture") == 2
        run(inputs())  # the context has moved on: the first graph is void
        assert cuda.events.count("capture") == 3


def scene_what_cannot_be_recorded_runs_without() -> None:
    cuda = FakeCuda(recordable=False)
    run = execution(graphs=True, cuda=cuda)
    with library.failing():
        assert run(inputs())["out_sample"].shape == (2, 4, 8, 8)
        run(inputs())
        assert cuda.events.count("capture") == 1


def main() -> None:
    global library, scratch
    verbosity.level = 0
    library = Library(Path(sys.argv[1]))
    failed: dict[str, str] = {}
    recorded = 0
    scenes = [(name, scene) for name, scene in globals().items() if name.startswith("scene_")]
    for name, scene in scenes:
        print("running", name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            try:
                scene()
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                failed[name] = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
        recorded += len(library.journal)
    print(json.dumps({"scenes": [name for name, _ in scenes], "failed": failed, "recorded": recorded}))


if __name__ == "__main__":
    main()
