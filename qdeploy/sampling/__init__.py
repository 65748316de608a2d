"""Images from stock diffusers pipelines, with whatever denoiser stands in them."""
