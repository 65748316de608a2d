"""CLIP score: how well images show their prompts, by a CLIP model of the user's choice (Hessel et al. 2021).

The score is 100 max(0, cos) of the embeddings of image and prompt; the reference's score is reported too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import MergingMeter, Metric
from qdeploy.evaluate.metrics.paired import about_mean
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.system.errors import CapabilityError, InvalidInputError


class ClipMeter(MergingMeter):
    """Embeds images and prompts batch by batch.

    Args:
        source: folder or Hub id of a CLIP model with its processor.
    """

    def __init__(self, source: str | Path) -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise CapabilityError("the CLIP score needs transformers: pip install 'qdeploy[sd]'") from error
        try:
            self._model = CLIPModel.from_pretrained(source).eval()
            self._processor = CLIPProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(f"{source} is no CLIP model: {first}") from error
        self._source = str(source)
        self._scores: tuple[list[float], list[float]] = ([], [])

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        if pair.prompts is None:
            return {}
        sides = {"expected": pair.expected_images, "made": pair.images}
        return {
            name: torch.tensor(self.scores(images, pair.prompts), dtype=torch.float64)
            for name, images in sides.items()
        }

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        for scores, name in zip(self._scores, ("expected", "made"), strict=True):
            scores += observed[name].tolist() if name in observed else []

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """A score for each image [N, C, H, W] in [0, 1] and its prompt."""
        pixels = (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
        given = self._processor(
            text=list(prompts), images=list(pixels), return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad():
            output = self._model(**given)
        image, text = (
            torch.nn.functional.normalize(embeds, dim=-1)
            for embeds in (output.image_embeds, output.text_embeds)
        )
        values: list[float] = (100 * (image * text).sum(-1).clamp(min=0)).tolist()
        return values

    def result(self) -> dict[str, Any] | None:
        expected, made = self._scores
        if not made:
            return None
        reference = round(sum(expected) / len(expected), 3)
        value = about_mean(made, 3, of_the_reference=reference, network=Path(self._source).name)
        return {**value, "reference": "the prompts"}


def _begin(context: MetricContext) -> ClipMeter | None:
    return ClipMeter(context.clip) if context.clip is not None else None


METRIC = Metric("clip_score", "agreement of images with their prompts, by a CLIP model", begin=_begin)
