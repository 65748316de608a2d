"""An engine in stock pipelines: the images are those of the torch model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.drop_in.denoiser import EngineDenoiser
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import CapabilityError, InvalidInputError
from tests.engines.bundles import CONFIG, example_inputs, write_bundle

SCHEDULERS = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler with fractional t": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineDenoiser]:
    """Of an engine of a few layers, made by hand."""
    folder = tmp_path_factory.mktemp("denoiser")
    write_bundle(folder / "onnx")
    with load_engine(build_engine(folder / "onnx", folder / "engine", threads=1)) as engine:
        yield engine.as_denoiser()


def images(pipeline: Any, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return torch.as_tensor(pipeline(generator=generator, output_type="np", **arguments).images)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unmodified_pipeline_gives_the_images_of_the_torch_model(
    ddpm: Path, ddpm_engine: Artifact, name: str
) -> None:
    kind, options = SCHEDULERS[name]
    pipeline = diffusers.DDPMPipeline.from_pretrained(ddpm)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    expected = images(pipeline, batch_size=2, num_inference_steps=7)
    with load_engine(ddpm_engine) as engine:
        pipeline.unet = engine.as_denoiser()
        torch.testing.assert_close(images(pipeline, batch_size=2, num_inference_steps=7), expected, **{
            "rtol": 0, "atol": 1e-4
        })  # fmt: skip
    if "fractional" in name:
        assert (pipeline.scheduler.timesteps % 1 != 0).any()


def test_the_ddim_pipeline_takes_it_at_construction(ddpm: Path, ddpm_engine: Artifact) -> None:
    stock = diffusers.DDPMPipeline.from_pretrained(ddpm)
    schedule = diffusers.DDIMScheduler.from_config(stock.scheduler.config)
    expected = images(
        diffusers.DDIMPipeline(stock.unet, schedule), batch_size=2, num_inference_steps=5, eta=0.5
    )
    with load_engine(ddpm_engine) as engine:
        mine = images(
            diffusers.DDIMPipeline(engine.as_denoiser(), schedule),
            batch_size=2,
            num_inference_steps=5,
            eta=0.5,
        )
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)


def test_from_pretrained_takes_it_too(ddpm: Path, ddpm_engine: Artifact) -> None:
    with load_engine(ddpm_engine) as engine:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(ddpm, unet=engine.as_denoiser())
        assert isinstance(pipeline.unet, EngineDenoiser)
        assert images(pipeline, batch_size=2, num_inference_steps=2).shape == (2, 8, 8, 3)


def test_prompts_and_guidance_reach_the_engine(
    stable_diffusion: Path, stable_diffusion_engine: Artifact
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    arguments = {"prompt": ["a cat", "two dogs"], "num_inference_steps": 3, "guidance_scale": 4.0}
    expected = images(pipeline, **arguments)
    with load_engine(stable_diffusion_engine) as engine:
        pipeline.unet = engine.as_denoiser()
        torch.testing.assert_close(images(pipeline, **arguments), expected, rtol=0, atol=1e-4)
        with pytest.raises(InvalidInputError, match=r"'sample' of shape \[batch, 4, 8, 8\]"):
            pipeline(height=32, width=32, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_16_bits_runs_on_it_and_stays_in_16_bits(
    stable_diffusion: Path, stable_diffusion_engine: Artifact, dtype: torch.dtype
) -> None:
    """The VAE of such a pipeline takes nothing but latents of its dtype."""
    load = diffusers.StableDiffusionPipeline.from_pretrained
    arguments = {"prompt": ["a cat", "two dogs"], "num_inference_steps": 3, "guidance_scale": 4.0}
    full = images(load(stable_diffusion, safety_checker=None), **arguments)
    stock = images(load(stable_diffusion, safety_checker=None, torch_dtype=dtype), **arguments)
    with load_engine(stable_diffusion_engine) as engine:
        given = load(stable_diffusion, safety_checker=None, torch_dtype=dtype, unet=engine.as_denoiser())
        moved = load(stable_diffusion, safety_checker=None)
        moved.unet = engine.as_denoiser()
        moved.to(dtype)
        assert moved.unet.dtype == dtype
        assert moved.to(torch.float32).unet.dtype == torch.float32
        moved.to(dtype)
        for pipeline in (given, moved):
            mine = images(pipeline, **arguments)
            # The U-Net computes in f32 here, so that it is at least as near as the pipeline that does not.
            assert (mine - full).square().mean() < 2 * (stock - full).square().mean()


def test_a_lora_is_refused_with_what_to_do_instead(
    stable_diffusion: Path, stable_diffusion_engine: Artifact, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    weights = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1, 16),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(16, 1),
    }
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    with load_engine(stable_diffusion_engine) as engine:
        pipeline.unet = engine.as_denoiser()
        pytest.importorskip("peft")
        with pytest.raises(CapabilityError, match="fuse the LoRA into the model first"):
            pipeline.load_lora_weights(tmp_path)


# -- the contract, without a pipeline ----------------------------------------------------------------------


def test_it_answers_as_diffusers_models_do(denoiser: EngineDenoiser) -> None:
    inputs = example_inputs(2)
    sample, t = inputs["sample"], inputs["timestep"]
    expected = denoiser.engine(inputs)
    assert torch.equal(denoiser(sample, t).sample, expected)
    assert torch.equal(denoiser(sample, timestep=t, return_dict=False)[0], expected)
    assert torch.equal(denoiser(sample=sample, timestep=t, class_labels=None)["sample"], expected)
    assert torch.equal(denoiser(sample, t)[0], expected)


@pytest.mark.parametrize("t", [3, 3.0, torch.tensor(3), torch.tensor([3.0])])
def test_timesteps_come_in_all_forms(denoiser: EngineDenoiser, t: Any) -> None:
    sample = example_inputs(2)["sample"]
    assert torch.equal(denoiser(sample, t).sample, denoiser(sample, torch.tensor(3.0)).sample)


def test_it_describes_itself_as_diffusers_models_do(denoiser: EngineDenoiser) -> None:
    assert isinstance(denoiser, torch.nn.Module)
    assert denoiser.config.in_channels == denoiser.config["in_channels"] == CONFIG["in_channels"]
    assert denoiser.config.sample_size == CONFIG["sample_size"]
    assert denoiser.dtype == torch.float32
    assert denoiser.device == torch.device("cpu")
    assert denoiser.to("cpu").eval() is denoiser
    assert not sum(parameter.numel() for parameter in denoiser.parameters())
    with denoiser.cache_context("cond"):
        pass


def test_sizes_of_layers_can_be_looked_up(denoiser: EngineDenoiser) -> None:
    assert denoiser.conv_in.out_channels == CONFIG["block_out_channels"][0]
    assert denoiser.conv_in.weight.is_meta
    with pytest.raises(AttributeError):
        _ = denoiser.nothing_of_the_kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": torch.tensor([1, 2])}, "without 'class_labels'"),
        ({"encoder_hidden_states": torch.zeros(2, 4)}, "encoder_hidden_states"),
        ({"sample": torch.zeros(2, 3, 8, 8)}, "of shape"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(
    denoiser: EngineDenoiser, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        denoiser(**{**example_inputs(2), **arguments})
    assert error.value.exit_code == 5


def test_residuals_adapters_and_scales_are_refused_but_their_absence_is_not(
    stable_diffusion_engine: Artifact,
) -> None:
    with load_engine(stable_diffusion_engine) as engine:
        unet = engine.as_denoiser()
        call: dict[str, Any] = {
            "sample": torch.zeros(2, 4, 8, 8),
            "timestep": 5,
            "encoder_hidden_states": torch.zeros(2, 8, 16),
        }
        for nothing in (None, {}, {"scale": None}):
            unet(**call, cross_attention_kwargs=nothing, timestep_cond=None)
        for extra in (
            {"down_block_additional_residuals": (torch.zeros(2, 8, 8, 8),)},
            {"cross_attention_kwargs": {"scale": 0.5}},
            {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 4)}},
        ):
            with pytest.raises(InvalidInputError, match="exported without"):
                unet(**call, **extra)
        del call["encoder_hidden_states"]
        with pytest.raises(InvalidInputError, match="encoder_hidden_states"):
            unet(**call)


def test_methods_that_change_the_network_are_refused_in_a_sentence(
    stable_diffusion_engine: Artifact,
) -> None:
    with load_engine(stable_diffusion_engine) as engine:
        unet = engine.as_denoiser()
        for method, arguments, message in (
            ("load_lora_adapter", ({},), "fuse the LoRA into the model first"),
            ("enable_freeu", (0.9, 0.2, 1.2, 1.4), "FreeU"),
            ("set_attn_processor", (None,), "its graph is finished"),
            ("fuse_qkv_projections", (), "its graph is finished"),
        ):
            with pytest.raises(CapabilityError, match=message) as error:
                getattr(unet, method)(*arguments)
            assert method in str(error.value)
            assert error.value.exit_code == 4
        # What undoes these has nothing to undo, and pipelines without a method go on without it.
        unet.disable_freeu()
        unet.unload_lora()
        assert not hasattr(unet, "set_attention_slice")
        assert not hasattr(unet, "load_nothing_of_the_kind")


def test_predictions_come_in_the_dtype_of_the_sample(denoiser: EngineDenoiser) -> None:
    inputs = example_inputs(2)
    rounded = inputs["sample"].bfloat16()
    exact = denoiser(rounded.float(), inputs["timestep"]).sample
    found = denoiser(rounded, inputs["timestep"]).sample
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_plain_attributes_of_the_model_are_answered(denoiser: EngineDenoiser) -> None:
    """HunyuanDiT's pipeline reads a number that its model computed; Stable Cascade's the dtype of a parameter."""
    assert denoiser.sample_size == CONFIG["sample_size"]
    assert next(denoiser.parameters()).dtype == denoiser.dtype == torch.float32
    with pytest.raises(AttributeError):
        denoiser.inner_dimension  # noqa: B018


def test_it_cannot_be_saved_as_weights(denoiser: EngineDenoiser, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="copy its folder"):
        denoiser.save_pretrained(tmp_path)
