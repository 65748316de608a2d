"""Plans opened and engines called, through the real bindings over the recording library."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import onnx

from qdeploy.engines.tensorrt import builder as building
from qdeploy.engines.tensorrt import plan as plans
from qdeploy.engines.tensorrt.child import Built
from qdeploy.engines.tensorrt.execution import Execution
from qdeploy.engines.tensorrt.inspector import read_layers, report
from qdeploy.engines.tensorrt.logger import create, logger_of
from qdeploy.engines.tensorrt.worker import PLAN, BuildRequest
from tests.engines.tensorrt.bench import ADA, SHAPES, FakeCuda, inputs, plan_folder, write_graph
from tests.engines.tensorrt.stage import execution, in_order, library, opened, refused, scratch, trt

# -- what a build does on a machine with a GPU ------------------------------------------------------------------


def built(request: BuildRequest, folder: Path) -> Built:
    """The child process's part, which test_builder.py and test_rtx_builds.py show of the real builder."""
    (folder / PLAN).write_bytes(b"PLAN of a test")
    return Built(folder / PLAN, None, 0.0, None)


def whole(folder: Path, **build_options: Any) -> dict[str, Any]:
    """Build from a file, as the command line does; the sidecar."""
    write_graph(folder / "model.onnx")
    with (
        mock.patch.object(building, "require_gpu", return_value=ADA),
        mock.patch.object(building, "build_in_child", built),
        library.failing(),
    ):
        building.build(folder / "model.onnx", folder / "engine", **build_options)
    return json.loads((folder / "engine" / "plan.json").read_text())


def scene_a_build_on_a_gpu_leaves_a_plan_with_its_facts_and_what_the_inspector_tells() -> None:
    sidecar = whole(scratch.path, batch=3)
    assert sidecar["tensorrt"] == "11.4.0.106"
    assert sidecar["gpu"]["capability"] == "8.9"
    assert sidecar["profiles"] == "sample:1x4x8x8,3x4x8x8,6x4x8x8"
    assert sidecar["plan_bytes"] == 14
    layers = json.loads((scratch / "engine" / "layers.json").read_text())
    assert layers["source"] == "engine inspector"
    assert layers["layers"][0]["Name"] == "body.conv"
    assert layers["bytes"] == {"activations": 6000, "weights": 5000}
    in_order("Runtime.deserialize 14", "Inspector.getEngineInformation 1", "~Engine", "~Runtime")


def scene_a_stripped_build_keeps_the_weights_of_the_half_graph() -> None:
    whole(scratch.path, precision="f16", strip_plan=True)
    kept = onnx.load(scratch / "engine" / "weights" / "model.onnx")
    assert [tensor.data_type for tensor in kept.graph.initializer] == [onnx.TensorProto.FLOAT16]
    in_order("Runtime.deserialize", "ParserRefitter.refitFromFile model.onnx")


def scene_a_builder_that_cannot_start_is_a_missing_capability() -> None:
    logger = logger_of(trt)
    refused(lambda: create(trt.Builder, logger, logger=logger), "cannot start", code=4)


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

    refused(lambda: opened(version_compatible=True), plans.TRUST, code=4)
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
    told = report(layers, {"body.conv": "int8"})
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
