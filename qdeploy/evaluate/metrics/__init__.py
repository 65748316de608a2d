"""Metrics of paired sampling. Every module with a ``METRIC`` adds one; nothing else needs to know of it."""
