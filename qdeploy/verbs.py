"""Subpackages that can be called: ``qdeploy.calibrate(...)`` beside ``qdeploy.calibrate.rounding``.

The public functions bear the names of the subpackages that do the work. Importing a subpackage binds its
name in the package, so the module itself has to be callable.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(module: str, implementation: str) -> None:
    """Let a call of ``module`` call the function of the same name in ``implementation``."""
    verb = module.rpartition(".")[2]

    class Verb(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(implementation), verb)(*args, **kwargs)

    sys.modules[module].__class__ = Verb
