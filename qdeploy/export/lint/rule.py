"""What a rule is.

A rule is data and one function. The function yields hits; `rules` finds all of them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from qdeploy.export.graph.network import Network
from qdeploy.export.lint.scope import Scope
from qdeploy.system import plugins

E, W, I = "E", "W", "I"  # noqa: E741 - the letters that people read in the output
SEVERITIES = {
    E: "rejected when parsed or built, or computed wrongly",
    W: "silently slow or inaccurate",
    I: "advice",
}


class Hit(NamedTuple):
    """One place where a rule fires: a node, value or name; what to do; a severity if not the rule's own."""

    where: Any
    message: str
    severity: str | None = None


Hits = Iterator[Hit]
Check = Callable[[Network, Scope], Hits]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: how findings and waivers call it; the letters say whose rule it is.
        severity: of its findings, unless one says otherwise.
        what: what a graph has to be like.
        why: what happens otherwise.
        source: DOC NVIDIA's documentation, HDR public headers, IMP source of the ONNX importer, MO
            nvidia-modelopt, ISS public issues, RUN executed here, INF inferred.
        since: versions that it holds for.
        check: yields the hits.
        verified: whether an engine on real hardware has confirmed it.
    """

    id: str
    severity: str
    what: str
    why: str
    source: str
    since: str
    check: Check
    verified: bool = False

    @property
    def backend(self) -> str:
        """The engine that the rule is about."""
        return {"TRT": "tensorrt", "OV": "openvino"}[self.id.rstrip("0123456789")]

    @property
    def inferred(self) -> bool:
        """Whether it is our own inference, so that findings have to say so."""
        return "INF" in self.source and not self.verified


REGISTERED: dict[str, Rule] = {}  # by id, in the order of their import


def rule(
    id: str, severity: str, what: str, why: str, source: str, *, since: str = "all", verified: bool = False
) -> Callable[[Check], Check]:
    """Make a check a rule."""

    def register(check: Check) -> Check:
        if id in REGISTERED and REGISTERED[id].check.__module__ != check.__module__:
            raise ValueError(f"two rules are called {id}")
        REGISTERED[id] = Rule(id, severity, what, why, source, since, check, verified)
        return check

    return register


def rules() -> dict[str, Rule]:
    """All rules by id: those of every module of ``rules/``, and of the modules that other packages register.

    Raises:
        CapabilityError: a package registers a module that cannot be imported.
    """
    plugins.registered(plugins.LINT_RULES)  # importing a module is what makes its checks rules
    return dict(sorted(REGISTERED.items()))
