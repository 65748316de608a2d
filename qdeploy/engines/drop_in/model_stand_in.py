"""What all stand-ins for diffusers models have in common: configuration, dtype and device, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch import nn

from qdeploy.engines.drop_in.refusals import refusal
from qdeploy.model.networks import find_network_class
from qdeploy.system.errors import CapabilityError, InvalidInputError


class ModelStandIn(diffusers.ModelMixin, ConfigMixin):
    """A diffusers model without weights, whose work an engine does.

    It is a `ModelMixin`, so that ``DiffusionPipeline.from_pretrained(..., unet=...)`` takes it.

    Args:
        config: of the original model.
        path: the engine's folder, for messages.

    Raises:
        InvalidInputError: diffusers has no class of the name in the configuration.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        super().__init__()
        name = str(config.get("_class_name"))
        original = find_network_class(name)
        if original is None:
            raise InvalidInputError(f"{path} was made from a {name}, which this diffusers lacks")
        self._original, self._path = original, path
        # ``register_to_config`` would look for __init__ parameters; the configuration is another class's.
        self._internal_dict: Any = FrozenDict(config)
        # Something for ``pipe.to("cuda", torch.bfloat16)`` to move and cast.
        # Some pipelines read the dtype of a component's first parameter (Stable Cascade's prior).
        self._place = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """Follows ``pipe.to``; results have the dtype of what they were made from."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline keeps its tensors: wherever it was moved. The engine fetches and returns them."""
        return self._place.device

    @cached_property
    def _hollow(self) -> nn.Module:
        """The original network without memory for its weights."""
        with torch.device("meta"):
            hollow: nn.Module = self._original.from_config(dict(self._internal_dict))
        return hollow

    def __getattr__(self, name: str) -> Any:
        # Some pipelines look at layers' sizes: SDXL at add_embedding.linear_1.in_features.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_original" not in self.__dict__:
                raise
            if (refused := refusal(self._original, name, self._path)) is not None:
                return refused
            found = self._hollow._modules.get(name)
            if found is not None:
                return found
            # And at plain numbers: HunyuanDiT's at inner_dim.
            plain = vars(self._hollow).get(name)
            if not isinstance(plain, bool | int | float | str | tuple):
                raise
            return plain

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Engines have no weights to save.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"an engine is no diffusers model to save: copy its folder {self._path}")
