"""Which preset: the table names presets that exist, and numbers that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from qdeploy.recipe.resolve import presets, resolve_recipe
from qdeploy.recipe.which import MODELS, PROCESSORS, WISHES, Advice, choices, which
from qdeploy.system.errors import UsageError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = [f"{choice.preset}-{'-'.join(choice.processors)}" for choice in choices()]


@pytest.mark.parametrize("choice", choices(), ids=NAMES)
def test_a_row_names_a_preset_and_known_words_and_says_where_its_evidence_is(choice: Advice) -> None:
    assert choice.preset in presets()
    assert set(choice.models) <= MODELS.keys()
    assert set(choice.processors) <= PROCESSORS.keys()
    assert set(choice.wishes) <= WISHES.keys()
    assert choice.evidence
    given: dict[str, Any] = {
        flag.removeprefix("--"): value for flag, value in zip(choice.options[::2], choice.options[1::2])
    }
    assert resolve_recipe(choice.preset, **given)


@pytest.mark.parametrize("choice", choices(), ids=NAMES)
def test_numbers_are_those_of_the_results_files(choice: Advice) -> None:
    for each in choice.measured:
        runs = json.loads((RESULTS / f"{each['model']}.json").read_text())["results"]
        values = [run["values"] for run in runs if run["run"] == each["run"]]
        assert each["sqnr"] == round(mean(value["SQNR dB, median"] for value in values), 1)
        assert each["psnr"] == round(mean(value["PSNR dB"] for value in values), 1)
    for each in choice.few_bits:
        runs = json.loads((RESULTS / "four-bits.json").read_text())["results"]
        of_model = [run for run in runs if (run["model"], run["recipe"]) == (each["model"], each["recipe"])]
        assert len(of_model) == 3
        assert each["sqnr"] == round(mean(run["sqnr_db"] for run in of_model), 1)
    if choice.blocks:
        rows = json.loads((RESULTS / "blocks-digits-dit.json").read_text())["results"]
        plain, blocks = (
            next(
                row
                for row in rows
                if (row["weights"], row["backend"], row["precision"]) == (weights, "openvino", "f32")
            )
            for weights in ("float", choice.preset)
        )
        assert choice.blocks == {
            "disk_mb": blocks["disk_mb"], "float_mb": plain["disk_mb"], "sqnr": blocks["sqnr_db"]
        }  # fmt: skip


def test_the_first_preset_of_four_bits_for_a_transformer_is_the_best_that_was_measured() -> None:
    runs = json.loads((RESULTS / "four-bits.json").read_text())["results"]
    own = [run for run in runs if run["model"] == "digits-dit" and run["recipe"] in presets()]
    four = [
        run["recipe"]
        for run in own
        if run["precision"].startswith("W4") and not run["precision"].endswith("A4")
    ]
    means = {name: mean(run["sqnr_db"] for run in own if run["recipe"] == name) for name in four}
    blocks = {name: value for name, value in means.items() if "blocks" in name}
    assert which("DiT 4-bit CPU quality")[0].preset == max(blocks, key=blocks.__getitem__)
    assert (
        max(blocks.values()) > max(means.values()) - 1
    )  # the best of all, up to what calibrations differ by


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_finds_a_preset_on_every_processor_but_one_without_vnni(
    model: str, processor: str
) -> None:
    assert which(f"{model} {processor}")


def test_words_mean_the_same_in_any_order_and_spelling() -> None:
    assert which("DiT 4-bit CPU") == which("cpu, transformer w4") == which("flux cpu 4 bits")
    assert [choice.preset for choice in which("unet cpu fast")] == ["w8a8-minmax-cpu"]


@pytest.mark.parametrize(
    ("question", "words"),
    [("", "a few words"), ("cpu fest", "did you mean 'fast'?"), ("unet avx2 4-bit", "leave one")],
)
def test_a_question_without_an_answer_is_refused(question: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        which(question)
    assert words in str(refused.value)
