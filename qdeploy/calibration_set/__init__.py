"""The calibration set: what a denoiser is given along its sampling trajectory, recorded and stored."""
