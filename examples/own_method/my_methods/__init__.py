"""Calibration methods of our own."""
