"""What holds of every engine, whatever its backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdeploy.engines.base import Engine
from qdeploy.engines.build import load_engine
from qdeploy.engines.openvino import OpenVINOEngine
from qdeploy.engines.openvino_shapes import KEPT_SHAPES
from qdeploy.system.errors import InvalidInputError
from tests.engines.bundles import CHANNELS, MEANT, SIZE, denoiser_graph, example_inputs, expected

# float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_an_engine_computes_what_the_graph_says(engine: Engine) -> None:
    inputs = example_inputs()
    torch.testing.assert_close(engine(inputs), expected(denoiser_graph(True), inputs), **CLOSE)


def test_rows_of_different_timesteps_equal_separate_calls(engine: Engine) -> None:
    inputs = example_inputs(5)
    together = engine(inputs)
    for row in range(5):
        alone = engine({"sample": inputs["sample"][row : row + 1], "timestep": inputs["timestep"][row]})
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


def test_a_batch_of_two_equals_two_of_one(engine: Engine) -> None:
    sample = example_inputs(2)["sample"]
    t = torch.tensor(12.25)
    two = engine({"sample": sample, "timestep": t})
    ones = [engine({"sample": sample[row : row + 1], "timestep": t}) for row in range(2)]
    torch.testing.assert_close(two, torch.cat(ones), **CLOSE)


@pytest.mark.parametrize("t", [torch.tensor(5), torch.tensor([5]), torch.tensor([5, 5]), torch.tensor(5.0)])
def test_every_way_of_writing_one_timestep_is_the_same(engine: Engine, t: torch.Tensor) -> None:
    sample = example_inputs(2)["sample"]
    assert torch.equal(
        engine({"sample": sample.double(), "timestep": t}),
        engine({"sample": sample, "timestep": torch.tensor(5.0)}),
    )


def test_outputs_and_inputs_are_left_alone_by_later_calls(engine: Engine) -> None:
    inputs = example_inputs(1)
    before = {name: x.clone() for name, x in inputs.items()}
    first = engine(inputs)
    kept = first.clone()
    engine({"sample": -inputs["sample"], "timestep": inputs["timestep"]})
    assert torch.equal(first, kept)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_inputs_may_be_views(engine: Engine) -> None:
    sample = example_inputs(4)["sample"]
    view = sample[::2].flip(-1)
    t = torch.tensor(1.0)
    result = engine({"sample": view, "timestep": t})
    assert torch.equal(result, engine({"sample": view.clone(), "timestep": t}))


def test_kernels_tell_the_layers_that_ran(engine: Engine) -> None:
    kernels = engine.kernels(example_inputs(1))
    assert {layer for kernel in kernels for layer in kernel.layers} >= MEANT
    assert all(kernel.type and kernel.kind for kernel in kernels)


def test_times_of_kernels_are_told_on_demand(engine: Engine) -> None:
    untimed, timed = engine.kernels(example_inputs(1)), engine.kernels(example_inputs(1), calls=3)
    assert all(kernel.ms is None for kernel in untimed)
    what = [(kernel.kind, kernel.precision, kernel.type) for kernel in untimed]  # names may hold counters
    assert [(kernel.kind, kernel.precision, kernel.type) for kernel in timed] == what
    assert sum(kernel.ms for kernel in timed if kernel.ms is not None) > 0
    multiplying = [kernel for kernel in timed if MEANT.intersection(kernel.layers)]
    assert multiplying
    assert all(kernel.ms is not None and kernel.ms >= 0 for kernel in multiplying)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": None}, "'sample' .* missing"),
        ({"timestep": None}, "'timestep' .* missing"),
        ({"class_labels": torch.zeros(2)}, "no input 'class_labels'"),
        ({"sample": torch.zeros(2, CHANNELS + 1, SIZE, SIZE)}, r"\[batch, 3, 6, 6\], not \[2, 4, 6, 6\]"),
        ({"sample": torch.zeros(2, CHANNELS, SIZE, SIZE + 2)}, r"not \[2, 3, 6, 8\]"),
        ({"sample": torch.zeros(CHANNELS, SIZE, SIZE)}, r"not \[3, 6, 6\]"),
        ({"timestep": torch.zeros(3)}, "timestep.*2 rows"),
    ],
)
def test_wrong_inputs_are_refused_with_a_sentence(
    engine: Engine, change: dict[str, torch.Tensor | None], message: str
) -> None:
    inputs = {name: x for name, x in {**example_inputs(2), **change}.items() if x is not None}
    with pytest.raises(InvalidInputError, match=message):
        engine(inputs)
    with pytest.raises(InvalidInputError, match=message):
        engine.kernels(inputs)


@pytest.mark.parametrize("engine_folder", ["openvino"], indirect=True)
def test_openvino_compiles_once_for_each_shape_and_keeps_few(engine_folder: Path) -> None:
    with load_engine(engine_folder) as engine:
        assert isinstance(engine, OpenVINOEngine)
        t = torch.tensor(1.0)
        for _ in range(2):
            engine({"sample": example_inputs(2)["sample"], "timestep": t})
        first = next(iter(engine.shaped.compiled.values()))
        assert len(engine.shaped.compiled) == 1
        for rows in range(3, 3 + KEPT_SHAPES):
            engine({"sample": example_inputs(rows)["sample"], "timestep": t})
        assert len(engine.shaped.compiled) == KEPT_SHAPES
        assert first not in engine.shaped.compiled.values()
