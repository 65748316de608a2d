"""Artifacts: folders with a manifest, hashed, made whole or not at all."""
