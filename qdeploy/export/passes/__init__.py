"""Graph rewrites, one per file: each says its rules, and whether it changed the graph."""
