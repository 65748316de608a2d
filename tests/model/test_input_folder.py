"""Folders of inputs are read as they lie, and what is broken in them is named before any work."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qdeploy.calibration_set.collect import collect
from qdeploy.model.input_folder import InputFolder
from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import InvalidInputError
from tests.models.pipelines import stable_diffusion_folder


def picture(file: Path, colour: Any = "red", size: int = 4, mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), colour).save(file)
    return file


def bomb(file: Path, side: int = 60_000) -> None:
    """A PNG of a few hundred bytes whose header promises 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_each_kind_becomes_the_argument_of_its_name(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "blue")):
        picture(tmp_path / "image" / f"{number}.png", colour)
        picture(tmp_path / "mask_image" / f"{number}.png", 255 * number, mode="L")
        for frame in range(3):
            picture(tmp_path / "video" / f"{number}" / f"{frame}.jpg", colour)
    picture(tmp_path / "control_image.png", "green")
    (tmp_path / "source_prompt.txt").write_text("one\ntwo\n")
    save_file({"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, tmp_path / "image_embeds.safetensors")
    found = InputFolder(tmp_path).arguments([1, 2])
    assert [each.getpixel((0, 0)) for each in found["image"]] == [(0, 0, 255), (255, 0, 0)]
    assert [each.mode for each in found["mask_image"]] == ["L", "L"]
    assert [len(each) for each in found["video"]] == [3, 3]
    assert [each.getpixel((0, 0)) for each in found["control_image"]] == [(0, 128, 0)] * 2
    assert found["source_prompt"] == ["two", "one"]
    assert found["image_embeds"].tolist() == [[3.0, 4.0], [1.0, 2.0]]
    alone = InputFolder(tmp_path).arguments([0])
    assert alone["image"].size == (4, 4)
    assert alone["source_prompt"] == "one"
    assert alone["image_embeds"].shape == (1, 2)


def test_prompts_may_lie_beside_the_images_they_belong_to(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("make it red\nmake it blue\n")
    sampling = Sampling(inputs=tmp_path)
    assert sampling.prompts == ("make it red", "make it blue")
    assert sampling.inputs_of([0]) == {}


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        picture(folder / "image" / "0.png")
    assert InputFolder(one).sha256 == InputFolder(other).sha256
    picture(other / "image" / "0.png", "blue")
    assert InputFolder(one).sha256 != InputFolder(other).sha256


def broken(folder: Path) -> None:
    file = picture(folder / "image" / "0.png", size=64)
    file.write_bytes(file.read_bytes()[:60])


def no_picture(folder: Path) -> None:
    picture(folder / "image" / "0.png").write_text("nothing")


def missing(folder: Path) -> None:
    (folder / "image").mkdir(parents=True)
    (folder / "image" / "0.png").symlink_to(folder / "nowhere.png")


def unpaired(folder: Path) -> None:
    for name, count in (("image", 3), ("mask_image", 2)):
        for number in range(count):
            picture(folder / name / f"{number}.png")


def unknown(folder: Path) -> None:
    picture(folder / "image.png")
    (folder / "notes.doc").write_text("x")


def damaged(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "image_embeds.safetensors").write_bytes(b"nothing")


BAD = {
    broken: "is no picture that can be read",
    no_picture: "is no picture that can be read",
    missing: "is missing",
    unpaired: "2 for mask_image.*equally many|3 for image.*equally many",
    unknown: "no input of a known kind",
    damaged: "truncated or no safetensors file",
    lambda folder: bomb(folder / "image" / "0.png"): "decompression bomb",
    lambda folder: bomb(folder / "image" / "0.png", 12_000): "12000 x 12000 pixels, more than the 64 million",
    lambda folder: (folder / "image").mkdir(parents=True): "is empty",
    lambda folder: folder.mkdir(): "holds no inputs",
    lambda folder: None: "is no folder of inputs",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: getattr(bad, "__name__", "other"))
def test_bad_folders_are_refused_before_any_work(bad: Any, tmp_path: Path) -> None:
    bad(tmp_path / "inputs")
    model = tmp_path / "sd"
    if not model.exists():
        stable_diffusion_folder(model)
    with pytest.raises(InvalidInputError, match=BAD[bad]):
        collect(
            model, tmp_path / "set", samples=3, steps=2, keep=2, prompts=["a"], inputs=tmp_path / "inputs"
        )
    assert {path.name for path in tmp_path.iterdir()} <= {"inputs", "sd"}
