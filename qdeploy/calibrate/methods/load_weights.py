"""Load weights from another checkpoint, so that one rounding serves several recipes for activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from qdeploy.calibrate.session import Session
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.quant.state import code_shapes, quantizers, read_state
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.stages import ROUNDINGS, WEIGHT_SCALES, Stage
from qdeploy.store.artifact import Checkpoint, open_artifact
from qdeploy.system.errors import InvalidInputError, UsageError

# What a stage may have done to the channels of a weight before it was rounded.
_CHANNELS = ("smoothing", "order", "split", "rotation", "branch_down", "branch_up")


@dataclass(frozen=True)
class LoadWeights(Stage):
    """Take scales and roundings of all weights from a checkpoint of the same model.

    Running it raises `InvalidInputError` where that is no checkpoint, was made from another model, or its
    weights have another format or coverage.

    Attributes:
        checkpoint: its folder.
    """

    name = "load-weights"
    description = "scales and roundings of weights from another checkpoint"
    gives = (WEIGHT_SCALES, ROUNDINGS)

    checkpoint: str = ""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: no checkpoint is named.
        """
        super().__post_init__()
        if not self.checkpoint:
            raise UsageError("the stage load-weights needs the checkpoint to load from")

    def run(self, session: Session) -> None:
        """Set scales and codes of all weights."""
        source = open_artifact(self.checkpoint, Checkpoint)
        _check_alike(session, source)
        stored = load_file(source.quantized)
        shapes = code_shapes(session.denoiser)

        _check_channels(session, stored, self.checkpoint)

        def compute() -> None:
            for name, quantizer in quantizers(session.denoiser):
                if not isinstance(quantizer, WeightQuantizer):
                    continue
                if f"{name}.codes" not in stored:
                    raise InvalidInputError(
                        f"{self.checkpoint} does not quantize {name}: calibrate with its coverage"
                    )
                quantizer.set(stored[f"{name}.scale"], stored[f"{name}.zero_point"])
                quantizer.hold(stored[f"{name}.codes"], shapes[name])

        session.once("weights", compute)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        return 0, 0


def _check_alike(session: Session, source: Checkpoint) -> None:
    if source.made_from.get("model") != session.draft.made_from["model"]:
        raise InvalidInputError(f"{source.path} was made from another model")
    recipe = Recipe.from_json(source.recipe or {})
    if recipe.weights != session.recipe.weights and not (recipe.layers or session.recipe.layers):
        raise InvalidInputError(
            f"{source.path} has {recipe.weights} weights, and {session.recipe.weights} are wanted"
        )
    for path in quantized_layers(session.denoiser):
        theirs, ours = recipe.formats(path)[0], session.recipe.formats(path)[0]
        if theirs != ours:
            names = [each.name if each else "float" for each in (theirs, ours)]
            raise InvalidInputError(
                f"{source.path} has {names[0]} weights at {path}, and {names[1]} are wanted"
            )


def _check_channels(session: Session, stored: Mapping[str, Tensor], checkpoint: str) -> None:
    """Make sure that the weights were rounded for inputs that were scaled and cut as they are here."""
    ours = read_state(session.denoiser)
    for path in quantized_layers(session.denoiser):
        for name in (f"{path}.{kind}" for kind in _CHANNELS):
            alike = (name in ours) == (name in stored)
            if not alike or (name in ours and not torch.equal(ours[name], stored[name])):
                raise InvalidInputError(
                    f"the weights of {path} in {checkpoint} were made for another {name.rpartition('.')[2]} of "
                    "its channels"
                )
