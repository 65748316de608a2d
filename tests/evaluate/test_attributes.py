"""Attribute accuracy: judged thing by thing, each mistake on its own account, with a true interval."""

from __future__ import annotations

import pytest
import torch

from qdeploy.evaluate.attribute_network import Found, Reading
from qdeploy.evaluate.intervals import of_share
from qdeploy.evaluate.metrics.attributes import (
    ATTRIBUTES,
    AttributesMeter,
    Tally,
    attribute_accuracy,
    judge_picture,
)
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.evaluate.scene_captions import wanted

PAIR = "a large red circle left of a small blue square on a white background"


def reading(*things: tuple[str, str, str, float, float], background: str = "white") -> Reading:
    return Reading(tuple(Found(*thing) for thing in things), background)


def verdict(prompt: str, shown: Reading) -> dict[str, bool]:
    asked = wanted(prompt)
    assert asked is not None
    return judge_picture(asked, shown)


def wrong(prompt: str, shown: Reading) -> set[str]:
    return {name for name, right in verdict(prompt, shown).items() if not right}


def test_a_right_picture_is_right_in_all() -> None:
    shown = reading(("square", "blue", "small", 50, 30), ("circle", "red", "large", 12, 34))
    assert verdict(PAIR, shown) == dict.fromkeys(ATTRIBUTES, True)


@pytest.mark.parametrize(
    ("shown", "mistakes"),
    [
        (
            # The colours of the two are exchanged: all words are there, bound to the wrong things.
            reading(("square", "red", "small", 50, 30), ("circle", "blue", "large", 12, 34)),
            {"colour"},
        ),
        (
            reading(("square", "blue", "large", 50, 30), ("circle", "red", "large", 12, 34)),
            {"size"},
        ),
        (
            reading(("square", "blue", "small", 12, 30), ("circle", "red", "large", 50, 34)),
            {"relation"},
        ),
        (
            # To the right, but further down than right.
            reading(("square", "blue", "small", 30, 55), ("circle", "red", "large", 12, 10)),
            {"relation"},
        ),
        (
            reading(
                ("square", "blue", "small", 50, 30),
                ("circle", "red", "large", 12, 34),
                ("star", "red", "small", 30, 8),
                background="grey",
            ),
            {"count", "background"},
        ),
        (
            reading(("circle", "red", "large", 12, 34)),
            {"shape", "colour", "size", "count", "relation"},
        ),
        (reading(), {"shape", "colour", "size", "count", "relation"}),
    ],
)
def test_a_mistake_counts_where_it_was_made(shown: Reading, mistakes: set[str]) -> None:
    assert wrong(PAIR, shown) == mistakes


def test_of_several_equal_things_a_missing_one_is_a_wrong_count_alone() -> None:
    two = reading(("star", "green", "small", 10, 10), ("star", "green", "small", 40, 40))
    assert wrong("three small green stars", two) == {"count"}
    assert wrong("two small green stars", two) == set()
    odd = reading(("star", "green", "small", 10, 10), ("cross", "green", "small", 40, 40))
    assert wrong("two small green stars", odd) == {"shape"}


def test_what_the_prompt_leaves_open_is_not_judged() -> None:
    shown = reading(("star", "green", "small", 10, 10), background="brown")
    assert verdict("a green star", shown).keys() == {"shape", "colour", "count"}


def test_a_tally_counts_each_attribute_over_the_prompts_that_ask_for_it() -> None:
    tally = Tally()
    shown = reading(("star", "green", "small", 10, 10), background="brown")
    tally.add("a green star", shown)
    tally.add("a small red star on a brown background", shown)
    tally.add("something else entirely", shown)
    result = tally.result()
    assert tally.skipped == 1
    assert {name: (value["accuracy"], value["count"]) for name, value in result.items()} == {
        "shape": (1.0, 2),
        "colour": (0.5, 2),
        "size": (1.0, 1),
        "count": (1.0, 2),
        "background": (1.0, 1),
    }
    assert result["colour"]["interval"] == [round(bound, 4) for bound in of_share(1, 2)]


class Eyes:
    """Sees a green star wherever there is light, and nothing in the dark."""

    def read(self, images: torch.Tensor) -> list[Reading]:
        star = ("star", "green", "small", 10, 10)
        return [reading(*[star] if image.max() > 0 else []) for image in images]


def test_images_are_read_and_set_beside_their_prompts() -> None:
    prompts = ["a green star", "a red star", "a green star"]
    values = attribute_accuracy(torch.ones(3, 3, 64, 64), prompts, Eyes())  # type: ignore[arg-type]
    assert values["colour"]["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert values["shape"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="zip"):
        attribute_accuracy(torch.ones(2, 3, 64, 64), prompts, Eyes())  # type: ignore[arg-type]


def test_a_check_sets_the_subject_beside_the_reference() -> None:
    meter = AttributesMeter(Eyes())  # type: ignore[arg-type]
    assert meter.result() is None
    light, dark = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    meter.add(Pair([], light, dark))  # without prompts nothing can be asked for
    assert meter.result() is None
    meter.add(Pair([], light, light, ["a green star", "a red star"]))
    meter.add(Pair([], light, dark, ["a green star", "a green star"]))
    result = meter.result()
    assert result is not None
    shape, colour = result["shape"], result["colour"]
    assert (shape["accuracy"], shape["of_the_reference"], shape["count"]) == (0.5, 1.0, 4)
    assert (colour["accuracy"], colour["of_the_reference"]) == (0.25, 0.75)
    assert result["reference"] == "the prompts"
