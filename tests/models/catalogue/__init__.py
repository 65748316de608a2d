"""Tiny random pipelines of the denoising pipelines of diffusers, by class, for `tools/compatibility.py`.

Every module adds some: a function under ``@tiny`` makes one, and says how it is sampled.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests.models.catalogue.entry import ENTRIES, Entry

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["ENTRIES", "Entry"]
