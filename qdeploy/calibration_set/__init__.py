"""The calibration set: denoiser inputs recorded along the sampling trajectory."""
