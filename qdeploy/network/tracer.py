"""One forward pass, followed operation by operation and layer by layer.

The structure of a network (`qdeploy.network.roles`) and the places where the timestep's embedding enters it
(`qdeploy.network.modulation`) are found by subclasses, which handle these events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qdeploy.model.inputs import denoise
from qdeploy.network.observe import ModuleCall, observing

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


class WrappedLayer(nn.Module):
    """A module that replaces one weighted layer and counts as that layer in every trace.

    Attributes:
        inner: the layer.
    """

    inner: nn.Module


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one weighted layer, quantized or not."""
    return isinstance(module, (*WEIGHTED, WrappedLayer))


class Tracer(TorchFunctionMode):
    """Reports what happens in a forward pass. A layer is one event, whatever it computes inside.

    Attributes:
        running: paths of the modules that are running, the outermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self._layers = 0  # that are running, one inside of the other

    def trace(self, denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run a network, in the state that it is in, without gradients.

        Args:
            denoiser: in evaluation mode.
            inputs: named as `qdeploy.model.inputs.flatten_inputs` names them.

        Returns:
            Its prediction.
        """
        with observing(dict(denoiser.named_modules()), self._begin, self._end), torch.no_grad(), self:
            return denoise(denoiser, inputs)

    def operation(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """A torch function has run outside of any layer."""

    def module_begins(self, call: ModuleCall) -> None:
        """A module, of any kind, is about to run."""

    def layer_begins(self, call: ModuleCall) -> None:
        """A layer is about to run."""

    def layer_ends(self, call: ModuleCall) -> None:
        """A layer has run."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._layers:
            self.operation(func, args, kwargs or {}, result)
        return result

    def _begin(self, call: ModuleCall) -> None:
        self.running.append(call.name)
        self.module_begins(call)
        if is_layer(call.module):
            self._layers += 1
            if self._layers == 1:
                self.layer_begins(call)

    def _end(self, call: ModuleCall) -> None:
        self.running.pop()
        if is_layer(call.module):
            self._layers -= 1
            if not self._layers:
                self.layer_ends(call)
