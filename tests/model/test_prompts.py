"""Prompt files: lines, COCO captions, samples of long files, and what is refused."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.model.prompts import LIMIT, PromptFile, read_prompts
from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import InvalidInputError, UsageError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_are_prompts_and_empty_ones_are_not(tmp_path: Path) -> None:
    file = written(tmp_path / "p.txt", "\ufeffa red circle\n\n  ein grüner Kreis \r\nlast")
    assert read_prompts(file) == ["a red circle", "ein grüner Kreis", "last"]
    assert read_prompts(file, limit=2) == ["a red circle", "ein grüner Kreis"]


def test_of_coco_captions_each_image_gives_its_first_one(tmp_path: Path) -> None:
    notes = [
        {"image_id": 9, "id": 1, "caption": "nine"},
        {"image_id": 2, "id": 8, "caption": "second of two"},
        {"image_id": 2, "id": 3, "caption": "first\n of two "},
    ]
    file = written(tmp_path / "captions.json", json.dumps({"annotations": notes, "images": []}))
    assert read_prompts(file) == ["first of two", "nine"]


def test_of_a_million_lines_no_more_are_read_than_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes behind the wanted lines are no text, which would be refused if they were read."""
    lines = "".join(f"prompt {number}\n" for number in range(LIMIT + 5000)).encode()
    file = written(tmp_path / "p.txt", lines + b"\xff\xfe\n" * 1_000_000)
    began = time.perf_counter()
    assert read_prompts(file) == [f"prompt {number}" for number in range(LIMIT)]
    assert time.perf_counter() - began < 2
    assert f"the first {LIMIT} are used" in capsys.readouterr().err
    assert len(read_prompts(file, limit=LIMIT + 10)) == LIMIT + 10
    assert not capsys.readouterr().err


def test_many_prompts_stay_in_their_file(tmp_path: Path) -> None:
    lines = ["\ufeffzero", "", *(f"  größer als {number} " for number in range(1, 20000))]
    file = written(tmp_path / "p.txt", "\n".join(lines))
    many = read_prompts(file, limit=19990)
    assert isinstance(many, PromptFile)
    assert len(many) == 19990
    assert many[0] == "zero"
    assert many[-1] == many[19989] == "größer als 19989"
    assert many[2:4] == ["größer als 2", "größer als 3"]
    with pytest.raises(IndexError):
        many[19990]
    assert sys.getsizeof(many._offsets) < 10 * len(many)


def test_a_plan_names_the_file_and_refuses_another_content(tmp_path: Path) -> None:
    file = written(tmp_path / "p.txt", "".join(f"prompt {number}\n" for number in range(6000)))
    sampling = Sampling(prompts=read_prompts(file, limit=5500))
    written_down = json.loads(json.dumps(sampling.arguments_json()))
    assert len(json.dumps(written_down)) < 2000
    again = Sampling(**written_down)
    assert again.prompts_of([5499, 5500]) == ["prompt 5499", "prompt 0"]
    assert again.to_json() == sampling.to_json()
    file.write_bytes(file.read_bytes().replace(b"prompt 7\n", b"prompt x\n"))
    with pytest.raises(InvalidInputError, match="other prompts than were planned with"):
        Sampling(**written_down)


def test_a_sample_is_fair_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    file = written(tmp_path / "p.txt", "\n".join(map(str, range(20))))
    assert read_prompts(file, 5, seed=3) == read_prompts(file, 5, seed=3)
    assert len(set(read_prompts(file, 5, seed=3))) == 5
    drawn = Counter(prompt for seed in range(2000) for prompt in read_prompts(file, 5, seed=seed))
    assert all(400 < drawn[str(number)] < 600 for number in range(20))  # 500, give or take five deviations
    assert read_prompts(file, 50, seed=1) == [str(number) for number in range(20)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", ""),
        ("p.txt", "\n \n"),
        ("p.txt", bytes(range(256))),
        ("p.txt", b"text\0with zeros\n"),
        ("p.txt", b"a" * 100_000),
        ("p.json", "[1, 2"),
        ("p.json", "[1, 2]"),
        ("p.json", '{"annotations": [{"caption": "no image"}]}'),
        ("p.json", '{"annotations": [{"image_id": 1, "id": 1, "caption": 3}]}'),
        ("p.json", '{"annotations": []}'),
        ("p.json", b"\xff\xfe"),
    ],
    ids=repr,
)
def test_what_holds_no_prompts_is_refused_in_a_sentence(
    name: str, content: str | bytes, tmp_path: Path
) -> None:
    for seed in (None, 1):
        with pytest.raises(InvalidInputError) as refused:
            read_prompts(written(tmp_path / name, content), seed=seed)
        assert "\n" not in str(refused.value)


def test_a_missing_file_a_folder_and_no_number_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.txt", tmp_path):
        with pytest.raises(InvalidInputError, match="cannot be read"):
            read_prompts(path)
    with pytest.raises(UsageError):
        read_prompts(written(tmp_path / "p.txt", "a"), limit=0)


def test_the_command_line_says_it_with_an_exit_code(
    qdeploy: Callable[..., Result], ddpm: Path, tmp_path: Path
) -> None:
    empty = written(tmp_path / "p.txt", "")
    assert qdeploy("sample", ddpm, "-o", tmp_path / "s", "--prompts", empty).exit_code == 5
    assert qdeploy("collect", ddpm, "-o", tmp_path / "s", "--prompt-count", 3).exit_code == 2
