"""Metrics of paired sampling. Every module with a ``METRIC`` adds one; no other module lists them."""
