"""Attribute accuracy: judged thing by thing, each mistake on its own account, with a true interval."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from qdeploy.evaluate.metrics.attributes import ATTRIBUTES, Tally, attribute_accuracy, judge, wilson
from qdeploy.zoo.attribute_network import Found, Reading
from qdeploy.zoo.scene_captions import wanted

PAIR = "a large red circle left of a small blue square on a white background"


def reading(*things: tuple[str, str, str, float, float], background: str = "white") -> Reading:
    return Reading(tuple(Found(*thing) for thing in things), background)


def verdict(prompt: str, shown: Reading) -> dict[str, bool]:
    asked = wanted(prompt)
    assert asked is not None
    return judge(asked, shown)


def wrong(prompt: str, shown: Reading) -> set[str]:
    return {name for name, right in verdict(prompt, shown).items() if not right}


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 1), (93, 100), (480, 512)])
def test_the_interval_is_that_of_scipy(right: int, count: int) -> None:
    oracle = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


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
    assert result["colour"]["interval"] == [round(bound, 4) for bound in wilson(1, 2)]


def test_images_are_read_and_set_beside_their_prompts() -> None:
    class Eyes:
        def read(self, images: torch.Tensor) -> list[Reading]:
            return [reading(("star", "green", "small", 10, 10)) for _ in images]

    prompts = ["a green star", "a red star", "a green star"]
    values = attribute_accuracy(torch.zeros(3, 3, 64, 64), prompts, Eyes())  # type: ignore[arg-type]
    assert values["colour"]["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert values["shape"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="zip"):
        attribute_accuracy(torch.zeros(2, 3, 64, 64), prompts, Eyes())  # type: ignore[arg-type]
