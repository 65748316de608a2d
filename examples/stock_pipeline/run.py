"""An INT8 engine in a stock diffusers pipeline."""

from diffusers import StableDiffusionPipeline

import qdeploy
from qdeploy.model.zoo import find_zoo_model

PROMPTS = ["a red circle", "a blue square on a white background"]


def main() -> None:
    # Real work takes 64 images of 50 steps; these numbers are for trying it out.
    data = qdeploy.collect("scenes", "set", prompts=PROMPTS, samples=2, steps=4, keep=2, guidance=4.0)
    checkpoint = qdeploy.calibrate("scenes", "w8a8", recipe="w8a8-minmax", calibration=data, effort="fast")
    engine = qdeploy.build_engine(qdeploy.export(checkpoint, "onnx"), "engine", threads=1)

    pipe = StableDiffusionPipeline.from_pretrained(find_zoo_model("scenes"))
    pipe.unet = qdeploy.load_engine(engine).as_denoiser()  # the rest of the pipeline is untouched
    pipe(PROMPTS[0], num_inference_steps=4, guidance_scale=4.0).images[0].save("circle.png")


if __name__ == "__main__":
    main()
