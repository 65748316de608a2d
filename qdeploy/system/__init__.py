"""The machine, its memory and devices, errors, progress, tables, hashes."""
