"""Pictures over time: a row for each tensor, time as in sampling, and the same bytes every time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context
from PIL import Image
from torch import Tensor

from qdeploy.plots.pictures import error_by_timestep, picture_folder, range_heat_map, relative_ranges
from qdeploy.system.errors import InvalidInputError, UsageError

YELLOW = (253, 231, 36)  # of a tensor's largest range


def planted(spans: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
    """Ranges of tensors with these largest magnitudes [Q, T], at timesteps 0, 10, 20, ..."""
    names = names or [f"layer{number:03d}.input.0" for number in range(len(spans))]
    ranges = {"timesteps": torch.arange(spans.shape[1]) * 10.0}
    for name, span in zip(names, spans, strict=True):
        ranges |= {f"{name}.low": -span / 2, f"{name}.high": span}
    return ranges


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        assert image.format == "PNG"
        data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, 3).int()


def like(image: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """[H, W] where the picture has a colour."""
    return (image - torch.tensor(colour)).abs().amax(2) < 4


def columns_of(mask: Tensor, least: int) -> Tensor:
    """Columns in which a colour fills many pixels: those of the axes, not of the text."""
    return (mask.sum(0) >= least).nonzero().flatten()


@pytest.mark.parametrize("count", [1, 7, 40, 101])
def test_there_is_a_row_for_each_tensor(tmp_path: Path, count: int) -> None:
    spans = torch.ones(count, 2)
    spans[0::2, 0], spans[1::2, 1] = 0.0, 0.0  # rows alternate in colour
    range_heat_map(planted(spans), tmp_path / "ranges.png")
    image = pixels(tmp_path / "ranges.png")
    mask = like(image, YELLOW)
    left = columns_of(mask, 12 * (count // 2)) if count > 1 else columns_of(mask, 8)
    column = mask[:, int(left[len(left) // 4])]
    runs = sum(bool(after) and not bool(before) for before, after in pairwise(column.tolist()))
    assert runs == (count + 1) // 2, "the highest timestep is at the left, where the even rows are largest"


def test_labels_have_room_and_the_picture_grows_with_the_tensors(tmp_path: Path) -> None:
    sizes = []
    for count in (3, 100, 900):
        range_heat_map(planted(torch.rand(count, 20)), tmp_path / f"{count}.png")
        sizes.append(pixels(tmp_path / f"{count}.png").shape[:2])
    heights, widths = zip(*sizes, strict=True)
    assert heights[0] < 200 < 1400 < heights[1] < heights[2] < 6000
    assert heights[1] / 100 > 10, "a line of text has its height in pixels"
    assert all(600 < width < 1200 for width in widths)
    image = pixels(tmp_path / "100.png")
    assert not bool((image[:, 0] < 250).any()), "no label is cut off at the left edge"


def test_each_tensor_is_relative_to_its_own_largest_range() -> None:
    shares = relative_ranges(planted(torch.tensor([[1.0, 4.0], [500.0, 100.0], [0.0, 0.0]])))
    assert torch.allclose(shares, torch.tensor([[0.25, 1.0], [1.0, 0.2], [0.0, 0.0]]))


def test_rows_are_in_the_order_of_execution() -> None:
    ranges = planted(torch.tensor([[1.0, 4.0], [5.0, 1.0]]), names=["a", "b"])
    assert torch.equal(relative_ranges(ranges)[:, 0], torch.tensor([0.25, 1.0]))
    ranges["order"] = torch.tensor([1, 0])  # b runs first
    assert torch.equal(relative_ranges(ranges)[:, 0], torch.tensor([1.0, 0.25]))


def test_the_same_ranges_give_the_same_bytes_whatever_the_settings(tmp_path: Path) -> None:
    ranges = planted(torch.rand(5, 6, generator=torch.Generator().manual_seed(0)))
    range_heat_map(ranges, tmp_path / "one.png")
    with rc_context({"image.cmap": "gray", "savefig.bbox": "tight", "figure.facecolor": "red"}):
        range_heat_map(ranges, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_ranges_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no tensor's range"):
        range_heat_map({"timesteps": torch.zeros(0)}, tmp_path / "ranges.png")
    assert not list(tmp_path.iterdir())


def test_errors_are_a_curve_each_and_time_goes_to_the_right(tmp_path: Path) -> None:
    series = {"before: $x_$": {0.0: 20.0, 500.5: 20.0, 999.0: 40.0}, "after": {0.0: 42.0, 999.0: 42.0}}
    error_by_timestep(series, tmp_path / "error.png")
    image = pixels(tmp_path / "error.png")
    assert 300 < image.shape[0] < image.shape[1] < 1000
    first, second = like(image, (31, 119, 180)), like(image, (255, 127, 14))
    assert int(first.sum()) > 200
    assert int(second.sum()) > 200
    middle = image.shape[1] // 2
    heights = [
        float(half.nonzero()[:, 0].float().mean()) for half in (first[:, 75:middle], first[:, middle:700])
    ]
    assert heights[0] < heights[1], "40 dB at t = 999 is at the left and higher up"


def test_the_folder_is_made_and_a_file_is_refused(tmp_path: Path) -> None:
    assert picture_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        picture_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be written"):
        picture_folder(tmp_path / "file" / "below")
