"""Pictures side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from qdeploy.evaluate.image_grid import image_grid
from qdeploy.system.errors import InvalidInputError


def test_images_of_one_seed_are_at_the_same_place(tmp_path: Path) -> None:
    one = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    other = one.clone()
    one[3, 0], other[3, 1] = 100, 100
    image_grid({"full precision": one, "8-bit": other}, tmp_path / "grid.png", columns=2, scale=8)
    sheet = Image.open(tmp_path / "grid.png")
    (left, top, right, bottom), place = (box_of(sheet, colour) for colour in ((100, 0, 0), (0, 100, 0)))
    assert (right - left, bottom - top) == (32, 32)
    assert (place[1], place[3]) == (top, bottom)
    assert place[0] - left == place[2] - right > 2 * 32


def test_one_channel_is_grey(tmp_path: Path) -> None:
    image_grid({"grey": torch.full((1, 1, 4, 4), 77, dtype=torch.uint8)}, tmp_path / "grid.png", scale=2)
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.mode == "L"
    assert sheet.tobytes().count(77) >= 8 * 8


def box_of(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The smallest box that holds all pixels of a colour."""
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(
        sheet.height, sheet.width, 3
    )
    rows, columns = (pixels == torch.tensor(colour)).all(2).nonzero().unbind(1)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_colours_are_kept(tmp_path: Path) -> None:
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 250
    image_grid({"red": red}, tmp_path / "grid.png", columns=1, scale=1)
    colours = {colour for _, colour in Image.open(tmp_path / "grid.png").getcolors(10**6) or []}
    assert (250, 0, 0) in colours
    assert (255, 255, 255) in colours


def test_images_that_do_not_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="different sizes"):
        image_grid({"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(2, 1, 4, 4)}, tmp_path / "grid.png")
    with pytest.raises(InvalidInputError, match="channels"):
        image_grid({"a": torch.zeros(1, 5, 4, 4)}, tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
