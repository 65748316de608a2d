"""Calibration methods: one file per paper with the stages that it brought."""
