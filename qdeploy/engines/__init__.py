"""Engines: a graph as one runtime executes it. Every module with a ``BACKEND`` adds a backend."""
