"""What a denoiser is made of, found by running it."""
