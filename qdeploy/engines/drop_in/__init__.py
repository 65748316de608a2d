"""An engine in the place of a pipeline's denoiser."""
