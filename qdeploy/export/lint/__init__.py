"""Lint: what an engine would reject, or run slowly, read off the graph before any build.

``rules/`` holds one function per rule, with its data above it; ``fixes/`` one rewrite per mending.
"""
