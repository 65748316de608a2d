"""An engine in the place of a pipeline's text encoder: ``pipe.text_encoder = EngineTextEncoder(...)``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.engines.component import EngineComponent
from qdeploy.system.errors import CapabilityError, InvalidInputError

_HIDDEN = "hidden_states."


class EngineTextEncoder(nn.Module):
    """A drop-in for the transformers model that an engine was made from.

    Args:
        folder: holds the original's ``config.json``.
        class_name: of the original.
        engine: from ``input_ids`` (and ``attention_mask``) to what the original returns.

    Raises:
        InvalidInputError: transformers has no such class.
    """

    def __init__(self, folder: Path, class_name: str, engine: EngineComponent) -> None:
        import transformers

        super().__init__()
        original = getattr(transformers, class_name, None)
        if original is None:
            raise InvalidInputError(f"{folder} was made from a {class_name}, which this transformers lacks")
        self.config = original.config_class.from_dict(json.loads((folder / "config.json").read_text()))
        self._engine, self._folder = engine, folder
        # Some pipelines read the dtype of a component's first parameter (Stable Cascade's prior).
        self._place = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """Follows ``pipe.to``; embeddings come out in it."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline keeps its tensors."""
        return self._place.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = True,
    ) -> Any:
        """Encode tokens ``[B, length]``.

        Raises:
            CapabilityError: hidden states, a mask or a length that the graph was not exported for.
        """
        from transformers.utils.generic import ModelOutput

        inputs = {"input_ids": input_ids}
        if "attention_mask" in self._engine.ports:
            inputs["attention_mask"] = (
                torch.ones_like(input_ids) if attention_mask is None else attention_mask
            )
        elif attention_mask is not None and not bool(attention_mask.all()):
            raise CapabilityError(f"{self._folder} was exported without a mask of its tokens")
        found: dict[str, Any] = {name: x.to(self.dtype) for name, x in self._engine(inputs).items()}
        hidden = tuple(found.pop(name) for name in list(found) if name.startswith(_HIDDEN))
        if output_hidden_states:
            if not hidden:
                raise CapabilityError(
                    f"{self._folder} was exported without hidden states: leave out clip_skip, or use the original "
                    "text encoder"
                )
            found["hidden_states"] = hidden
        return ModelOutput(**found) if return_dict or return_dict is None else tuple(found.values())
