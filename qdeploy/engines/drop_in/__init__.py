"""Engines in the places of a pipeline's networks: denoiser, text encoders, autoencoders."""
