"""Images from stock diffusers pipelines, with any denoiser in them."""
