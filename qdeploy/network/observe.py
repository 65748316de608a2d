"""The one way in which modules are watched while a network runs.

Everything that looks at a layer's inputs or outputs (ranges, reconstruction targets, structure, errors by layer)
names the modules that it observes and what to do with each of their calls. A module whose output is known already
can be spared its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        name: the name under which the module is observed; its path, in most cases.
        module: the module.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned; None before it has run.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def input(self) -> Tensor:
        """The first positional argument of a layer or quantizer, without its gradient."""
        tensor: Tensor = self.args[0]
        return tensor.detach()


@contextmanager
def observing(
    modules: Mapping[str, nn.Module],
    before: Callable[[ModuleCall], None] | None = None,
    after: Callable[[ModuleCall], Any] | None = None,
) -> Iterator[None]:
    """Within this context, every call of some modules is reported.

    Args:
        modules: what is observed, by name. One module may have several names.
        before: called before a module runs. An exception that it raises ends the forward pass.
        after: called after a module has run. What it returns takes the place of the output, unless it is None.
    """
    with ExitStack() as hooks:
        for name, module in modules.items():
            if before is not None:
                handle = module.register_forward_pre_hook(_pre_hook(name, before), with_kwargs=True)
                hooks.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(_hook(name, after), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


@contextmanager
def standing_in(modules: Mapping[str, nn.Module], output: Callable[[str], Any]) -> Iterator[None]:
    """Within this context, some modules do not run: each call returns what is given in its place.

    Args:
        modules: what does not run, by name.
        output: what a module of some name returns. It is asked at every call, and may be changed in place.
    """
    with ExitStack() as ends:
        for name, module in modules.items():
            own = module.__dict__.get("forward")
            module.forward = _instead(name, output)
            ends.callback(_put_back, module, own)
        yield


def _instead(name: str, output: Callable[[str], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output(name)

    return forward


def _put_back(module: nn.Module, own: Any) -> None:
    del module.forward
    if own is not None:
        module.forward = own


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call; the input of a layer, which AnimateDiff passes by name, comes first."""
    return ((kwargs["input"],), {}) if not args and kwargs.keys() == {"input"} else (args, kwargs)


def _pre_hook(name: str, before: Callable[[ModuleCall], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(ModuleCall(name, module, *_positional(args, kwargs)))

    return hook


def _hook(name: str, after: Callable[[ModuleCall], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return after(ModuleCall(name, module, *_positional(args, kwargs), output))

    return hook
