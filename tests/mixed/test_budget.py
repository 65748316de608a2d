"""Budgets: the optimum against brute force, sizes to the byte, recipes that can be edited, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qdeploy
from qdeploy.mixed.assignment import AssignmentProblem
from qdeploy.mixed.budget import in_words, parse_budget
from qdeploy.mixed.costs import Costs, stored_bytes
from qdeploy.mixed.plan import BUDGET, RECIPE
from qdeploy.mixed.ranking import LayerHarm
from qdeploy.recipe.formats import FORMATS
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError, UsageError

FORMAT_NAMES = ["int8", "int4", "int3"]


def problem(harms: list[list[float]], counts: list[int], inputs: bool = False) -> AssignmentProblem:
    layers = [
        LayerHarm(
            f"l{number}",
            "u",
            f"l{number}",
            count,
            count,
            {"weights": dict(zip(FORMAT_NAMES, harm, strict=True)), "activations": {"int8": 0.01}},
        )
        for number, (harm, count) in enumerate(zip(harms, counts, strict=True))
    ]
    parts = {layer.path: (layer.count,) for layer in layers}
    costs = Costs(1000, 50, parts, {layer.path: layer.macs for layer in layers}, 1000 + 4 * sum(counts))
    return AssignmentProblem(layers, costs, FORMAT_NAMES, ["int8", "none"] if inputs else ["int8"])


harm_lists = st.lists(
    st.tuples(st.floats(0, 0.1), st.floats(0, 1), st.floats(0, 5), st.integers(1, 400)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(harm_lists, st.floats(0, 1))
def test_the_assignment_is_the_best_of_all(
    drawn: list[tuple[float, float, float, int]], share: float
) -> None:
    made = problem([list(row[:3]) for row in drawn], [row[3] for row in drawn])
    every = []
    for names in itertools.product(FORMAT_NAMES, repeat=len(drawn)):
        size = 1000 + sum(
            -(-row[3] * FORMATS[name].bits // 8) for row, name in zip(drawn, names, strict=True)
        )
        harm = sum(row[FORMAT_NAMES.index(name)] + 0.01 for row, name in zip(drawn, names, strict=True))
        every.append((harm, size))
    low, high = min(size for _, size in every), max(size for _, size in every)
    bound = int(low + share * (high - low))
    best = min(harm for harm, size in every if size <= bound)
    found = made.solve({"size": bound})
    assert found is not None
    assert found.size <= bound
    assert found.harm <= best * 1.001 + 1e-6
    assert made.solve({"size": low - 1}) is None


def test_a_bound_on_bit_operations_leaves_inputs_in_float_where_they_suffer() -> None:
    """Float operands count with 32 bits each: the cheapest is all in integers, the best all in float."""
    made = problem([[0.001, 0.1, 1.0]] * 2, [100, 100], inputs=True)
    free = made.solve({})
    assert free is not None
    assert {activations for _, activations in free.formats.values()} == {"none"}
    tight = made.solve({"macs": made.costs.fixed_bit_operations + 100 * 32 * 32 + 100 * 64})
    assert tight is not None
    assert sorted(activations for _, activations in tight.formats.values()) == ["int8", "none"]


def test_layers_that_read_one_tensor_agree_on_its_format() -> None:
    made = problem([[0.001, 0.1, 1.0]] * 2, [100, 100], inputs=True)
    import dataclasses

    layers = [made.layers[0], dataclasses.replace(made.layers[1], reads="l0")]
    tied = AssignmentProblem(layers, made.costs, FORMAT_NAMES, ["int8", "none"])
    found = tied.solve({"macs": made.costs.fixed_bit_operations + 100 * 32 * 32 + 100 * 64})
    assert found is not None
    assert {activations for _, activations in found.formats.values()} == {"int8"}


@pytest.mark.parametrize(
    ("words", "full", "bound"),
    [
        ("size=3.2MB", 0, 3_200_000),
        ("size=50%", 1001, 500),
        ("size=2KiB", 0, 2048),
        ("macs=1.5G", 0, 1_500_000_000),
    ],
)
def test_budgets_in_words(words: str, full: int, bound: int) -> None:
    (limit,) = parse_budget(words).values()
    assert limit.bound(full) == bound


@pytest.mark.parametrize(
    "words",
    [
        "",
        "3MB",
        "size=",
        "size=big",
        "size=-3MB",
        "size=3MG",
        "macs=3MB",
        "time=3",
        "size=0",
        "size=1,size=2",
    ],
)
def test_other_words_are_refused_in_a_sentence(words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_budget(words)
    assert "\n" not in str(refused.value)


@given(st.integers(1, 10**13), st.sampled_from(["size", "macs"]))
def test_an_offered_budget_is_never_below_what_it_offers(amount: int, cost: str) -> None:
    (limit,) = parse_budget(in_words(cost, amount)).values()
    assert amount <= limit.bound(0) <= amount * 1.002 + 1


@pytest.fixture(scope="module")
def data(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = qdeploy.collect(ddpm, tmp_path_factory.mktemp("b") / "set", keep=4, samples=6, steps=8)
    assert isinstance(made, Artifact)
    return made


@pytest.fixture(scope="module")
def harms(ddpm: Path, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = qdeploy.sensitivity(ddpm, tmp_path_factory.mktemp("b") / "s", calibration=data, rows=8, cheap=True)
    assert isinstance(made, Artifact)
    return made


@pytest.fixture(scope="module")
def budgeted(
    ddpm: Path, data: Artifact, harms: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    made = qdeploy.calibrate(
        ddpm,
        tmp_path_factory.mktemp("b") / "c",
        calibration=data,
        sensitivity=harms,
        budget="size=26%",
        effort="fast",
    )
    assert isinstance(made, Artifact)
    return made


def test_the_size_that_is_foretold_is_the_size_on_disk(budgeted: Artifact) -> None:
    told = json.loads(budgeted.file(BUDGET).read_text())
    assert told["chosen"]["size"] == told["stored_size"] == stored_bytes(budgeted.path / "unet")
    assert told["stored_size"] <= told["bounds"]["size"]
    assert len(told["chosen"]["layers_by_weights"]) > 1
    sizes = [point["size"] for point in told["curve"]]
    harms = [point["harm"] for point in told["curve"]]
    assert sizes == sorted(sizes)
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(harms))


def test_its_recipe_makes_the_same_checkpoint_and_can_be_edited(
    ddpm: Path, data: Artifact, budgeted: Artifact, tmp_path: Path
) -> None:
    text = budgeted.file(RECIPE).read_text()
    (tmp_path / "own.yaml").write_text(text)
    again = qdeploy.calibrate(ddpm, tmp_path / "again", calibration=data, recipe=tmp_path / "own.yaml")
    assert isinstance(again, Artifact)
    stored = "unet/quantized.safetensors"
    assert again.files[stored] == budgeted.files[stored]
    (tmp_path / "own.yaml").write_text(f"{text}\n")
    edited = json.loads(json.dumps(budgeted.recipe))
    path = next(iter(edited["layers"][0]))
    assert path in text
    (tmp_path / "own.yaml").write_text(
        text.replace(f"{path}: {{weights: ", f"{path}: {{weights: int8}} #", 1)
    )
    changed = qdeploy.calibrate(ddpm, tmp_path / "edited", calibration=data, recipe=tmp_path / "own.yaml")
    assert isinstance(changed, Artifact)
    assert changed.recipe is not None
    assert changed.recipe["layers"][0] == {path: {"weights": "int8"}}


@pytest.mark.slow
def test_a_mixed_checkpoint_runs_as_onnx_as_it_was_simulated(budgeted: Artifact, tmp_path: Path) -> None:
    bundle = qdeploy.export(budgeted, tmp_path / "onnx")
    result = qdeploy.check(bundle, checkpoint=budgeted, min_sqnr=0)
    assert result.parity["sqnr_db"] >= 45
    assert result.passed, result.failures


def test_a_budget_that_cannot_be_met_offers_the_closest_one_which_then_can(
    ddpm: Path, data: Artifact, harms: Artifact, tmp_path: Path
) -> None:
    asked = {"calibration": data, "sensitivity": harms}
    with pytest.raises(UsageError, match="the least that these formats allow is size=") as refused:
        qdeploy.calibrate(ddpm, tmp_path / "c", budget="size=1%", **asked)  # type: ignore[arg-type]
    offered = str(refused.value).rpartition(" ")[2]
    made = qdeploy.calibrate(ddpm, tmp_path / "c", budget=offered, **asked)  # type: ignore[arg-type]
    assert isinstance(made, Artifact)
    with pytest.raises(UsageError, match=r"together: with size=.* the least is macs=|least .* is macs="):
        qdeploy.calibrate(ddpm, tmp_path / "d", budget=[offered, "macs=0.1%"], **asked)  # type: ignore[arg-type]


def test_what_does_not_go_with_a_budget_is_refused(
    ddpm: Path, data: Artifact, harms: Artifact, budgeted: Artifact, tmp_path: Path
) -> None:
    asked = {"calibration": data, "sensitivity": harms}
    with pytest.raises(UsageError, match="--weights"):
        qdeploy.calibrate(ddpm, tmp_path / "c", budget="size=50%", weights="int4", **asked)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--budget"):
        qdeploy.calibrate(ddpm, tmp_path / "c", **asked)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="sensitivity"):
        qdeploy.calibrate(ddpm, tmp_path / "c", budget="size=50%", calibration=data, sensitivity=budgeted)
    with pytest.raises(InvalidInputError, match=r"has no entry for.*coverage portable-time"):
        qdeploy.calibrate(ddpm, tmp_path / "c", budget="size=50%", coverage="portable-time", **asked)  # type: ignore[arg-type]
