"""Fixes: rewrites that remove what a rule finds, without changing what the graph computes.

A fix is a class in a file here that names its rule; nothing else lists it.
"""

from __future__ import annotations

from typing import ClassVar

from onnx_ir.passes import InPlacePass

from qdeploy.export.lint.scope import Scope
from qdeploy.system import plugins

_DEFAULT = Scope()


class Fix(InPlacePass):
    """A pass that fixes one rule's findings where it can do so exactly."""

    rule: ClassVar[str]

    def __init__(self, scope: Scope = _DEFAULT) -> None:
        super().__init__()
        self.scope = scope


def fixes() -> dict[str, type[Fix]]:
    """All fixes by their rule: those of the modules here, and of the modules that other packages register.

    Raises:
        CapabilityError: a package registers a module that cannot be imported.
    """
    plugins.registered(plugins.LINT_RULES)
    return {fix.rule: fix for fix in sorted(Fix.__subclasses__(), key=lambda fix: fix.rule)}
