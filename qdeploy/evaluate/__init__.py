"""Measuring: parity, paired quality and speed, each against a reference."""
