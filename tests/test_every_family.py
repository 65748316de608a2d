"""Collect, calibrate, export, build and check the families of denoisers in their stock pipelines, at tiny sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.evaluate.check import check
from qdeploy.export.run import export
from qdeploy.export.trace import export_program
from qdeploy.model.folder import open_model
from qdeploy.model.schedulers import make_scheduler
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import int8_sums_saturate
from qdeploy.workflows.calibrate import calibrate
from tests.models import dit_folder, flux_folder, pixart_folder, sd3_folder, sdxl_folder

# Folder, prompts, arguments of the pipeline.
FAMILIES: dict[str, tuple[Callable[[Path], Path], list[str], dict[str, int]]] = {
    "DiTTransformer2DModel": (dit_folder, ["1", "2"], {}),
    "PixArtTransformer2DModel": (pixart_folder, ["a cat", "two dogs"], {}),
    "SD3Transformer2DModel": (sd3_folder, ["a cat", "two dogs"], {}),
    "FluxTransformer2DModel": (flux_folder, ["a cat", "two dogs"], {"height": 16, "width": 16}),
    "UNet2DConditionModel": (sdxl_folder, ["a cat", "two dogs"], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_pipeline_to_an_engine_and_back(family: str, tmp_path: Path) -> None:
    make, prompts, size = FAMILIES[family]
    model = make(tmp_path / "model")
    assert open_model(model).class_name == family
    data = collect(model, tmp_path / "set", samples=8, keep=4, steps=5, prompts=prompts, guidance=3.0, **size)
    weights = "int7" if int8_sums_saturate() else "int8"  # what runs in int8 on this processor
    made = {"recipe": "w8a8-minmax", "weights": weights, "effort": "fast", "calibration": data}
    checkpoint = calibrate(model, tmp_path / "w8a8", **made)
    assert isinstance(checkpoint, Artifact)
    assert checkpoint.facts.layers > 10
    bundle = export(checkpoint, tmp_path / "onnx", components=False)
    engine = build_engine(bundle, tmp_path / "engine", backend="openvino", threads=1)
    told = check(engine, onnx=bundle, checkpoint=checkpoint)
    assert told.passed, told.failures
    assert told.parity["sqnr_db"] >= 45
    assert told.parity["pairs"]["fake-quant vs onnx"]["sqnr_db"] >= 45
    assert told.quality["sqnr_db"]["median"] >= 20
    measured = engine.measured
    assert measured.int8_mac_share_of_meant == 1
    # Of Flux attention is most, in float: 512 tokens of text beside a tiny image.
    assert measured.int8_mac_share > (0.14 if family == "FluxTransformer2DModel" else 0.15)
    # In the stock pipeline, with guidance, the engine's images are near the full-precision model's.
    asked = {"samples": 2, "steps": 3, "prompts": prompts, "guidance": 3.0, **size}
    own = sample(engine, tmp_path / "own", model=model, **asked)
    full = sample(model, tmp_path / "full", **asked)
    one, other = (_images(made) for made in (own, full))
    assert one.shape == other.shape
    assert (one - other).abs().mean() < 8  # of 255
    assert load_engine(engine).as_denoiser().config["_class_name"] == family


def test_a_flow_is_not_sampled_by_schedulers_of_diffusion() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(UsageError, match="the model is a flow; pass --scheduler FlowMatchEuler"):
        make_scheduler("ddim", flow)
    assert make_scheduler("FlowMatchHeunDiscreteScheduler", flow).config.shift == 3.0
    assert make_scheduler(None, flow) is flow


def test_squeezing_an_axis_that_is_not_1_is_no_part_of_the_graph() -> None:
    class Idle(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.squeeze(1) + x.reshape(-1, 1, 4, 4).squeeze(1)).relu()

    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    graph = export_program(Idle(), {"x": x}, ("y",))
    assert sum(node.op_type == "Squeeze" for node in graph.graph) <= 1
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), Idle()(x))


def _images(made: Artifact) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(made.file("images.safetensors"))["images"].float()
