"""Measuring: parity, paired quality and speed, each beside what it has to be compared with."""
