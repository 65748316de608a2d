"""Sampling: a torch model or an engine inside a stock diffusers pipeline."""
