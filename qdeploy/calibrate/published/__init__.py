"""Quantized checkpoints as the authors of methods publish them, read and put into a session's network."""
