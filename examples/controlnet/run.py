"""A pipeline with a ControlNet: calibrated on control images of one's own, sampled with them."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

import qdeploy
from qdeploy.model.zoo import find_zoo_model


def make_model(folder: Path) -> None:
    """The shipped model `scenes` with an untrained ControlNet, in place of a real one."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(find_zoo_model("scenes"))
    parts = {**pipe.components, "controlnet": ControlNetModel.from_unet(pipe.unet)}
    StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def make_inputs(folder: Path, size: int) -> None:
    """A control image for each image that is made."""
    (folder / "image").mkdir(parents=True, exist_ok=True)
    for number in range(2):
        picture = Image.new("RGB", (size, size))
        ImageDraw.Draw(picture).ellipse((4, 4, size - 4 - number, size - 4), outline="white")
        picture.save(folder / "image" / f"{number}.png")


def main() -> None:
    model, inputs = Path("controlnet-model"), Path("inputs")
    make_model(model)
    config = StableDiffusionControlNetPipeline.from_pretrained(model)
    make_inputs(inputs, config.unet.config.sample_size * config.vae_scale_factor)
    how = {"prompts": ["a red circle", "a blue circle"], "inputs": inputs, "guidance": 4.0}
    data = qdeploy.collect(model, "set", samples=2, steps=3, keep=2, **how)
    checkpoint = qdeploy.calibrate(
        model, "w8a8", recipe="w8a8-minmax", calibration=data, effort="fast", overwrite=True
    )
    qdeploy.sample(checkpoint, "images", samples=2, steps=3, **how)


if __name__ == "__main__":
    main()
