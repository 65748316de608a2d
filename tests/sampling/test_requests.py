"""Requests to a served pipeline: pictures of `sample`, whatever they are batched with, and errors one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdeploy.sampling.requests import LONGEST_PROMPT, ImageRequest, ServedPipeline, read_requests
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import EngineFolder
from qdeploy.system.errors import QDeployError, UsageError

ASKED: dict[str, Any] = {"steps": 2, "guidance": 4.0}


def test_pictures_are_those_of_sample_in_any_company(
    stable_diffusion_engine: EngineFolder, tmp_path: Path
) -> None:
    prompts = ["a cat", "two dogs"]
    made = sample(stable_diffusion_engine, tmp_path / "samples", samples=2, prompts=prompts, seed=5, **ASKED)
    expected = load_file(made.images)["images"].movedim(1, -1)
    served = ServedPipeline(stable_diffusion_engine.path)
    first = ImageRequest(5, "a cat", **ASKED)
    wrong = ImageRequest(5, None, **ASKED)  # this pipeline needs a prompt
    other = ImageRequest(5, "a cat", steps=1, guidance=4.0)
    answers = served([first, wrong, other, ImageRequest(6, "two dogs", **ASKED)])
    assert torch.equal(torch.stack([answers[0], answers[3]]), expected)  # type: ignore[list-item]
    assert isinstance(answers[1], QDeployError)
    assert "needs prompts" in str(answers[1])
    assert not torch.equal(answers[2], expected[0])  # type: ignore[arg-type]
    (alone,) = served([first])
    assert torch.equal(alone, expected[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "SEED is missing"),
        ({"SEED": []}, "SEED is missing"),
        ({"SEED": [1], "SIZE": [2]}, "no input SIZE"),
        ({"SEED": [1, 2], "PROMPT": [b"a"]}, "one value for each image"),
        ({"SEED": [-1]}, "the seed"),
        ({"SEED": [1], "STEPS": [-3]}, "from 1 to 1000, not -3"),
        ({"SEED": [1], "STEPS": [10**6]}, "number of steps"),
        ({"SEED": [1], "GUIDANCE": [float("nan")]}, "guidance must be"),
        ({"SEED": [1], "GUIDANCE": [float("inf")]}, "guidance must be"),
        ({"SEED": [1], "PROMPT": [b"x" * 10_000_000]}, "10000000"),
        ({"SEED": [1], "NEGATIVE_PROMPT": ["é" * LONGEST_PROMPT]}, "bytes"),
        ({"SEED": [1], "PROMPT": [b"\xff"]}, "no UTF-8"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_requests(columns)


def test_all_but_the_seed_may_be_left_out() -> None:
    assert read_requests({"SEED": [3, 4]}) == [ImageRequest(3), ImageRequest(4)]
    full = {"SEED": [3], "PROMPT": [b"a"], "NEGATIVE_PROMPT": ["b"], "STEPS": [7], "GUIDANCE": [2.5]}
    assert read_requests(full) == [ImageRequest(3, "a", "b", 7, 2.5)]
