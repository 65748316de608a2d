"""Pipelines of the catalogue go through, as docs/compatibility.md says; all of them by `make compatibility`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.catalogue import ENTRIES
from tools.compatibility import PAGE, RESULTS, page, run_one

# An image beside the sample, positions as inputs; hints as residuals, two calls a step, embeddings as inputs.
LOOKED_AT = ("StableDiffusionInstructPix2PixPipeline", "FluxPipeline")
WHOLE = ("StableDiffusionXLControlNetPipeline", "WanPipeline", "KandinskyV22Pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_preflight_says_that_a_pipeline_works(name: str, tmp_path: Path) -> None:
    found = run_one(name, tmp_path, verbs=("preflight",))
    assert found["passed"], found


@pytest.mark.slow
@pytest.mark.field
@pytest.mark.parametrize("name", WHOLE)
def test_pipelines_go_through_whole(name: str, tmp_path: Path) -> None:
    found = run_one(name, tmp_path)
    assert found["passed"], found


def test_the_page_says_what_the_results_say() -> None:
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results)
    assert set(results["pipelines"]) <= set(ENTRIES)
    assert not [name for name, found in results["pipelines"].items() if found["internal"]]
