"""The backends that engines are built for: an object ``BACKEND`` in a module each.

`qdeploy.system.plugins` lists them; other packages register theirs as entry points. The module of a backend
imports its runtime inside functions, so that the list of backends can be read where none of them is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from qdeploy.system import plugins
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.plugins import ENGINES, named
from qdeploy.system.suggest import unknown
from qdeploy.system.telemetry import import_silently

if TYPE_CHECKING:
    from pathlib import Path

    from qdeploy.engines.base import Engine
    from qdeploy.engines.component import EngineComponent
    from qdeploy.engines.spec import EngineSpec

PRECISIONS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Backend:
    """A runtime that engines can be built for.

    Attributes:
        name: the word for ``--backend``.
        description: one line for people.
        package: the import name of the runtime.
        install: the argument of ``pip install``: the package, or an extra of qdeploy.
        precisions: what it can compute float operations in.
        build: writes the runtime's files for a ``model.onnx`` into a folder; may return what the build took.
        load: the engine of verified files, with a number of threads or the runtime's own choice.
        rank: ``auto`` takes the available backend of the highest rank; 0 is never taken.
        device: where it computes, as torch calls it.
        build_options: names of further options of its builds; ``build`` takes them, ``precision`` and ``batch`` as
            keywords where there are any.
        check: raises `CapabilityError` where the machine lacks something that the backend needs besides its package.
        lacks: number formats (`qdeploy.recipe.formats`) that it has no kernels for.
        dialects: the targets whose quantized bundles it reads; empty for all.
        can_run: raises `CapabilityError` where the machine can build engines and cannot run them; None where every
            machine that builds also runs. Where it raises, an engine is built and not measured.
        limits: those of ``build_options`` that bound the build and leave the engine as it is.
        default_precision: the precision where nothing is said.
        narrow_sums: whether its int8 products may overflow where `machine.int8_sums_saturate`, so that its
            builds leave some layers in floats there.
        any_size: whether one engine takes images of several sizes.
        build_component: writes the runtime's files for the ``model.onnx`` of a text encoder or an autoencoder
            into a folder, for a precision; None where only denoisers are built.
        load_component: opens what that wrote: folder, precision, threads.
        rewrites_autoencoders: whether it runs graphs of autoencoders faster when `qdeploy.export.lower.AS_BUILT` has
            rewritten them, before they are quantized and built.
    """

    name: str
    description: str
    package: str
    install: str
    build: Callable[..., Mapping[str, Any] | None]
    load: Callable[[EngineSpec, int | None], Engine]
    precisions: tuple[str, ...] = ("f32", "bf16")
    rank: int = 0
    device: str = "cpu"
    build_options: tuple[str, ...] = ()
    check: Callable[[], None] | None = None
    lacks: frozenset[str] = frozenset()
    dialects: frozenset[str] = frozenset()
    narrow_sums: bool = False
    can_run: Callable[[], object] | None = None
    limits: tuple[str, ...] = ()
    default_precision: str = "f32"
    any_size: bool = False
    build_component: Callable[[Path, Path, str], None] | None = None
    load_component: Callable[[Path, str, int | None], EngineComponent] | None = None
    rewrites_autoencoders: bool = False

    def why_not_here(self) -> str | None:
        """Why this machine cannot run the engines that it builds; None if it can."""
        try:
            if self.can_run is not None:
                self.can_run()
        except CapabilityError as error:
            return str(error)
        return None

    def available(self) -> bool:
        """Whether the runtime is installed and the machine has what it needs to build engines and run them."""
        if self.why_not_here() is not None:
            return False
        try:
            if self.installed() and self.check is not None:
                self.check()
        except CapabilityError:
            return False
        return self.installed()

    def installed(self) -> bool:
        """Whether the runtime is installed. A folder of its name, such as a clone, is no installation."""
        try:
            spec = importlib.util.find_spec(self.package)
        except ValueError:  # a module in sys.modules without a spec
            return sys.modules.get(self.package) is not None
        return spec is not None and spec.origin is not None

    def require(self) -> None:
        """Make sure that the runtime is installed, and can run on this machine.

        Raises:
            CapabilityError: it cannot.
        """
        if self.check is not None:
            self.check()
        if not self.installed():
            raise CapabilityError(
                f"the backend {self.name} needs the package {self.package}: pip install {self.install}"
            )

    def version(self) -> str:
        """Version of the installed runtime."""
        return str(import_silently(self.package).__version__)


def backends() -> dict[str, Backend]:
    """All backends by name, best first: this package's, and those that other packages register.

    Raises:
        CapabilityError: a package registers one that cannot be imported.
    """
    return _ranked(plugins.registered(ENGINES))


@cache
def _ranked(modules: object) -> dict[str, Backend]:
    """The backends of what is registered, which is the key: another package makes another table."""
    found: dict[str, Backend] = named(ENGINES, lambda value: isinstance(value, Backend), "backend")
    return {backend.name: backend for backend in sorted(found.values(), key=lambda b: (-b.rank, b.name))}


def find_backend(name: str = "auto", formats: Iterable[str] = ()) -> Backend:
    """The backend of that name, its package installed.

    Args:
        name: a backend, or ``auto`` for the fastest that is installed.
        formats: names of the number formats that it has to run.

    Raises:
        UsageError: there is no such backend.
        CapabilityError: its package is missing, the machine cannot run it, or it lacks a format.
    """
    chosen = _named(name)
    if lacking := chosen.lacks.intersection(formats):
        able = [other.name for other in backends().values() if not other.lacks.intersection(formats)]
        raise CapabilityError(
            f"{chosen.name} has no kernels for {' and '.join(sorted(lacking))}: build with --backend "
            f"{' or '.join(able)}"
        )
    return chosen


def _named(name: str) -> Backend:
    if name == "auto":
        ranked = [backend for backend in backends().values() if backend.rank > 0]
        # The last one needs only its package, so its error message is the most useful one.
        chosen = next((backend for backend in ranked if backend.available()), ranked[-1])
        chosen.require()
        return chosen
    if name not in backends():
        raise UsageError(unknown("backend", name, ["auto", *backends()]))
    backends()[name].require()
    return backends()[name]
