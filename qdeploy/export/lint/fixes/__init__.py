"""Fixes: rewrites that remove what a rule finds, without changing what the graph computes.

A fix is a class in a file here that names its rule; nothing else lists it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import ClassVar

from onnx_ir.passes import InPlacePass

from qdeploy.export.lint.scope import Scope

_DEFAULT = Scope()


class Fix(InPlacePass):
    """A pass that fixes one rule's findings where it can do so exactly."""

    rule: ClassVar[str]

    def __init__(self, scope: Scope = _DEFAULT) -> None:
        super().__init__()
        self.scope = scope


@cache
def fixes() -> dict[str, type[Fix]]:
    """All fixes by their rule."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return {fix.rule: fix for fix in sorted(Fix.__subclasses__(), key=lambda fix: fix.rule)}
