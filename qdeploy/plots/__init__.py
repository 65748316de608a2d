"""Plots over timesteps."""
