"""Engines: a graph as one runtime executes it. The registry lists the backends."""
