"""The drawn world: the same seed draws the same, captions say what is there, nothing held out is ever trained on."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qdeploy.evaluate.scene_captions import Wanted, caption, wanted
from qdeploy.evaluate.scene_world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_SHARE,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    random_scene,
)
from tools.zoo.scene_drawing import PIXELS, draw, random_layout


def scenes(count: int, seed: int = 0, held_out: bool = False) -> list[Scene]:
    generator = np.random.default_rng(seed)
    return [random_scene(generator, held_out) for _ in range(count)]


def test_one_seed_draws_one_picture() -> None:
    def pictures(seed: int) -> list[bytes]:
        generator = np.random.default_rng(seed)
        made = []
        for _ in range(8):
            scene = random_scene(generator)
            made.append(draw(scene, random_layout(scene, generator), generator).tobytes())
        return made

    assert pictures(3) == pictures(3)
    assert pictures(3) != pictures(4)


def test_the_two_sides_of_the_split_share_no_scene_and_no_caption() -> None:
    train, held = scenes(2000), scenes(500, held_out=True)
    assert not set(train) & set(held)
    # A relation told from its other end is the same scene, on the same side.
    for turned in (False, True):
        assert not {caption(scene, turned=turned) for scene in train} & {
            caption(scene, turned=not turned) for scene in held
        }


def test_one_combination_in_eight_is_held_out() -> None:
    kinds = [Thing(*kind) for kind in product(SHAPES, COLOURS, SIZES)]
    every = [
        Scene((kind,) * count, background)
        for kind, count, background in product(kinds, (1, 2, 3), BACKGROUNDS)
    ]
    share = np.mean([scene.held_out for scene in every])
    assert share == pytest.approx(1 / HELD_OUT_SHARE, abs=0.03)


def test_things_related_differ_in_shape_or_colour() -> None:
    for scene in scenes(300):
        if scene.relation is not None:
            first, second = scene.things
            assert (first.shape, first.colour) != (second.shape, second.colour)
        else:
            assert len(set(scene.things)) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_a_full_caption_tells_the_whole_scene(turned: bool) -> None:
    for scene in scenes(300):
        told = wanted(caption(scene, turned=turned))
        things = tuple((thing.shape, thing.colour, thing.size) for thing in scene.things)
        assert told == Wanted(things, scene.background, scene.relation)


def test_a_shortened_caption_leaves_open_and_never_lies() -> None:
    generator = np.random.default_rng(1)
    left_open = {"size": 0, "background": 0}
    for scene in scenes(400):
        told = wanted(caption(scene, generator))
        assert told is not None
        assert told.relation == scene.relation
        assert [thing[:2] for thing in told.things] == [(t.shape, t.colour) for t in scene.things]
        assert told.background in (None, scene.background)
        assert all(t[2] in (None, thing.size) for t, thing in zip(told.things, scene.things, strict=True))
        left_open["background"] += told.background is None
        left_open["size"] += told.things[0][2] is None
    assert all(30 < count < 100 for count in left_open.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a mauve circle",
        "two red circles left of a blue square",
        "four red circles",
        "a red circle left of",
    ],
)
def test_other_texts_ask_for_nothing(text: str) -> None:
    assert wanted(text) is None


def test_people_need_not_write_as_the_captions_do() -> None:
    assert wanted(" Red circle  on a white background. ") == wanted("a red circle on a white background")


def test_a_relation_can_be_seen_and_things_have_room() -> None:
    generator = np.random.default_rng(2)
    for scene in scenes(200):
        layout = random_layout(scene, generator)
        assert bool((layout.centres > layout.radii[:, None]).all())
        assert bool((layout.centres < PIXELS - layout.radii[:, None]).all())
        if scene.relation is not None:
            right, down = layout.centres[1] - layout.centres[0]
            assert (right if scene.relation == "left of" else down) > 0
            assert (abs(right) > abs(down)) == (scene.relation == "left of")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_has_its_colour_and_its_place(shape: str) -> None:
    generator = np.random.default_rng(5)
    scene = Scene((Thing(shape, "red", "large"),), "black")
    layout = random_layout(scene, generator)
    picture = draw(scene, layout, generator)
    cover = picture[0] > 0.5
    assert 0.2 < cover.sum() / (np.pi * layout.radii[0] ** 2) < 1.1
    rows, columns = np.nonzero(cover)
    centre = np.array([columns.mean(), rows.mean()]) + 0.5
    assert np.abs(centre - layout.centres[0]).max() < 0.25 * layout.radii[0]
    inside = picture[:, cover].mean(1) * 255
    assert np.abs(inside - COLOURS["red"]).max() < 25
    assert np.abs(picture[:, 0, 0] * 255 - BACKGROUNDS["black"]).max() < 7
