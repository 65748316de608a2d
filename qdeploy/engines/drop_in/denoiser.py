"""An engine in the place of a pipeline's denoiser: ``pipe.unet = engine.as_denoiser()``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from qdeploy.engines.drop_in.model_stand_in import ModelStandIn
from qdeploy.model.call import CallForm, read_call
from qdeploy.store.facts import CallFacts
from qdeploy.system.errors import InvalidInputError

# What ControlNets and T2I adapters add to features inside of a denoiser. Zeros add what none adds.
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


@dataclass
class DenoiserOutput(BaseOutput):
    """What diffusers' denoisers return: attribute, key and index access to ``sample``."""

    sample: Tensor

    @property
    def predicted_image_embedding(self) -> Tensor:
        """The sample under the name that prior models use."""
        return self.sample


class Predictor(Protocol):
    """The part of an engine that this module needs.

    Attributes:
        path: its folder, for messages.
        config: the denoiser's diffusers configuration.
        call: how the denoiser is called, if that does not follow from its inputs.
    """

    path: Path
    config: dict[str, Any]
    call: CallFacts | None

    @property
    def ports(self) -> Mapping[str, Any]:
        """Its inputs by name."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction."""


class EngineDenoiser(ModelStandIn):
    """A drop-in for the diffusers model that an engine was made from.

    Arguments are those of the original class, by position or by name.

    Args:
        engine: computes the prediction.

    Raises:
        InvalidInputError: diffusers has no class of the name in the engine's configuration.
    """

    def __init__(self, engine: Predictor) -> None:
        super().__init__(engine.config, engine.path)
        self.engine = engine
        signature = inspect.signature(self._original.forward)
        self.signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    def forward(self, *args: Any, **kwargs: Any) -> DenoiserOutput | tuple[Tensor]:
        """Predict. Takes what the original class's ``forward`` takes, as far as the graph computes it.

        Raises:
            InvalidInputError: an argument has an effect that the graph does not compute.
        """
        try:
            found, tensors = read_call(self.signature, args, kwargs)
        except TypeError as error:
            raise InvalidInputError(f"{self._original.__name__}: {error}") from error
        found = self._with_zeros(found, tensors)
        self._check(found, tensors)
        result = self.engine(self._with_rows(tensors))
        sample = tensors.get(next(iter(self.signature.parameters)))
        if sample is not None and sample.is_floating_point():
            result = result.to(sample.dtype)
        wanted = self.signature.bind(*args, **kwargs).arguments.get("return_dict", True)
        return DenoiserOutput(sample=result) if wanted else (result,)

    def _with_zeros(self, found: CallForm, tensors: dict[str, Tensor]) -> CallForm:
        """Zeros for the residuals that the graph takes and a call without a ControlNet does not give.

        Args:
            found: the form of the call.
            tensors: of the call; zeros are added.

        Returns:
            The form with them.
        """
        sample = tensors.get(next(iter(self.signature.parameters)))
        form = CallForm.of(self.engine.call)
        arguments = dict(found.arguments)
        for name, port in self.engine.ports.items():
            argument = name.partition(".")[0]
            shape: tuple[int | None, ...] = getattr(port, "shape", ())
            row = [size for size in shape[1:] if size is not None]
            if name in tensors or argument not in RESIDUALS or sample is None or len(row) < len(shape) - 1:
                continue
            tensors[name] = sample.new_zeros(shape[0] or len(sample), *row)
            arguments[argument] = {"tensor": name} if form is None else form.arguments[argument]
        return CallForm(arguments, found.shared)

    def _check(self, found: CallForm, tensors: Mapping[str, Tensor]) -> None:
        """Make sure that the graph computes all that a call asks for.

        Raises:
            InvalidInputError: the call has a tensor that the graph does not take, or other constants.
        """
        unknown = [name for name in tensors if name not in self.engine.ports]
        rows = len(tensors.get(next(iter(self.signature.parameters)), ()))
        form = CallForm.of(self.engine.call)
        if form is not None:
            difference = form.difference(found, rows)
        else:
            unknown += list(found.constants)
            difference = None
        if unknown:
            raise InvalidInputError(
                f"the engine {self.engine.path} was exported without {unknown[0]!r} and cannot take it: use the "
                "original model for this"
            )
        if difference:
            raise InvalidInputError(
                f"the engine {self.engine.path} was made for other calls than one with {difference}"
            )

    def _with_rows(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        """Repeat for each row the inputs that a pipeline passes once for all rows, such as Flux's positions."""
        first = next(iter(self.signature.parameters))
        rows = len(flat[first]) if first in flat else 1
        for name, value in flat.items():
            shape = getattr(self.engine.ports[name], "shape", ()) if name != "timestep" else ()
            if len(shape) == value.ndim + 1:
                flat[name] = value.expand(rows, *value.shape)
        return flat

    # -- what pipelines ask of a denoiser other than a call ------------------------------------------------

    @contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """Pipelines of transformers enter this context around each call; an engine has no cache between calls."""
        yield
