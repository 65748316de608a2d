"""The real module has every name, argument and settable property that our sources use."""

from __future__ import annotations

from tests.engines.tensorrt.stand_in import StandIn, conformance

CONTRACT = {
    "trt.Builder", "trt.BuilderFlag.TF32", "BuilderFlag.STRIP_PLAN", "DataType.BF16",
    "Builder.build_serialized_network",
    "IBuilderConfig.builder_optimization_level =", "IExecutionContext.execute_async_v3(1)",
    "IOptimizationProfile.set_shape(4)", "OnnxParser.parse_from_file(1)", "ICudaEngine.get_tensor_dtype(1)",
    "IProgressMonitor.phase_start overridden with 3", "HardwareCompatibilityLevel.AMPERE_PLUS",
    "OnnxParserRefitter.refit_from_file(1)", "IRuntimeCache.deserialize(1)", "IRuntimeConfig.cuda_graph_strategy =",
    "ICudaEngine.create_runtime_config", "ITimingCache.combine(2)", "Builder.__init__(1)",
}  # fmt: skip


def test_every_name_exists_in_the_real_module(stand_in: StandIn) -> None:
    result = conformance(stand_in)
    assert result["wrong"] == []


def test_the_check_looks_at_what_matters(stand_in: StandIn) -> None:
    checked = conformance(stand_in)["checked"]
    assert set(checked) >= CONTRACT
    assert len(checked) > 90
