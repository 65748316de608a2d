"""The structure of a denoiser, found by running it."""
