"""Attribute accuracy: how often pictures show what their prompts ask for, by attribute.

For models that come with an attribute network, which reads things, colours and places back from a picture
(the zoo's ``scenes``). Every picture counts once per attribute: right or wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from qdeploy.evaluate.attribute_network import FOLDER, AttributeNetwork, Found, Reading
from qdeploy.evaluate.intervals import of_share
from qdeploy.evaluate.metrics.base import MergingMeter, Metric
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.evaluate.scene_captions import Wanted, wanted
from qdeploy.model.folder import Model

ATTRIBUTES = ("shape", "colour", "size", "count", "relation", "background")


def judge_picture(asked: Wanted, reading: Reading) -> dict[str, bool]:
    """Whether a picture shows what its prompt asks for, by attribute.

    Detected things are matched one to one with the requested ones, so that most shapes, colours and
    sizes agree. Shape, colour and size are right if every match has them and no kind of thing is missing; a
    wrong number of things is the count's mistake alone. A relation is right if the centres of both matches
    differ more in its direction than across it.
    """
    matched = _match(asked, reading.things)
    complete = {asked.things[row] for row in matched} == set(asked.things)

    def agree(place: int) -> bool:
        pairs = [(asked.things[row][place], _kind(found)[place]) for row, found in matched.items()]
        return complete and all(one in (None, other) for one, other in pairs)

    verdict = {"shape": agree(0), "colour": agree(1), "count": len(reading.things) == len(asked.things)}
    if any(size for _, _, size in asked.things):
        verdict["size"] = agree(2)
    if asked.background is not None:
        verdict["background"] = reading.background == asked.background
    if asked.relation is not None:
        verdict["relation"] = len(matched) == 2 and _related(matched[0], matched[1], asked.relation)
    return verdict


def _kind(found: Found) -> tuple[str, str, str]:
    return found.shape, found.colour, found.size


def _match(asked: Wanted, things: Sequence[Found]) -> dict[int, Found]:
    agreements = [
        [sum(a == b for a, b in zip(thing, _kind(found), strict=True)) for found in things]
        for thing in asked.things
    ]
    rows, columns = linear_sum_assignment(
        np.array(agreements).reshape(len(asked.things), len(things)), maximize=True
    )
    return {int(row): things[column] for row, column in zip(rows, columns, strict=True)}


def _related(first: Found, second: Found, relation: str) -> bool:
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation == "left of" else (down, right)
    return along > abs(across)


class Tally:
    """Counts right pictures per attribute."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        self.skipped = 0

    def add(self, prompt: str, reading: Reading) -> None:
        """Judge one picture; prompts outside the network's world are counted as skipped."""
        asked = wanted(prompt)
        if asked is None:
            self.skipped += 1
            return
        for attribute, right in judge_picture(asked, reading).items():
            self.count[attribute] += 1
            self.right[attribute] += right

    def read(self, images: Tensor, prompts: Sequence[str], network: AttributeNetwork) -> None:
        """Judge pictures ``[N, 3, H, W]`` in [0, 1], a prompt for each."""
        for prompt, reading in zip(prompts, network.read(images), strict=True):
            self.add(prompt, reading)

    def counts(self) -> Tensor:
        """Right pictures and all pictures of each attribute, [attributes + 1, 2]; the last row are those skipped."""
        rows = [(self.right[name], self.count[name]) for name in ATTRIBUTES]
        return torch.tensor([*rows, (0, self.skipped)])

    def merge(self, counts: Tensor) -> None:
        """Add the `counts` of other pictures."""
        *rows, (_, skipped) = counts.tolist()
        for name, (right, count) in zip(ATTRIBUTES, rows, strict=True):
            self.right[name] += right
            self.count[name] += count
        self.skipped += skipped

    def result(self) -> dict[str, dict[str, Any]]:
        """Accuracy, its 95 % interval after Wilson and the number of pictures, of each attribute asked for."""
        values = {}
        for name in ATTRIBUTES:
            if count := self.count[name]:
                right = self.right[name]
                values[name] = {
                    "accuracy": round(right / count, 4),
                    "interval": [round(bound, 4) for bound in of_share(right, count)],
                    "count": count,
                }
        return values


def attribute_accuracy(
    images: Tensor, prompts: Sequence[str], network: AttributeNetwork
) -> dict[str, dict[str, Any]]:
    """Accuracy of images against their prompts, by attribute.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        prompts: one per image.
        network: reads the images.

    Returns:
        For each attribute that a prompt asks for: ``accuracy``, ``interval`` (95 %, Wilson) and ``count``.
    """
    tally = Tally()
    tally.read(images, prompts, network)
    return tally.result()


class AttributesMeter(MergingMeter):
    """Attribute accuracy of the subject's images, and of the reference's from the same seeds and prompts.

    Args:
        network: reads the images.
    """

    def __init__(self, network: AttributeNetwork) -> None:
        self._network = network
        self._subject, self._reference = Tally(), Tally()

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        if pair.prompts is None:
            return {}
        counted = {}
        for name, images in {"subject": pair.images, "reference": pair.expected_images}.items():
            tally = Tally()
            tally.read(images, pair.prompts, self._network)
            counted[name] = tally.counts()
        return counted

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        for name, tally in {"subject": self._subject, "reference": self._reference}.items():
            if name in observed:
                tally.merge(observed[name])

    def result(self) -> dict[str, Any] | None:
        """For each attribute ``accuracy``, ``interval``, ``count`` and ``of_the_reference``."""
        own, theirs = self._subject.result(), self._reference.result()
        if not own:
            return None
        return {
            **{name: {**value, "of_the_reference": theirs[name]["accuracy"]} for name, value in own.items()},
            "reference": "the prompts",
        }


def _start(model: Model) -> AttributesMeter | None:
    folder = model.path / FOLDER
    return AttributesMeter(AttributeNetwork.load(folder)) if folder.is_dir() else None


METRIC = Metric("attributes", "share of images that show what their prompts ask for, by attribute", _start)
