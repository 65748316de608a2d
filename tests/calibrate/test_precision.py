"""Learning in 16 bits: recordings in float16 times a power of two, products of steps in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.methods.qdiffusion import AdaRound, round_unit
from qdeploy.calibrate.precision import PRECISIONS, products_in
from qdeploy.calibrate.recorded_rows import Recording
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.system.errors import CapabilityError, UsageError
from tests.helpers import MemoryRows, calibrating, relative, tiny_unet


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A U-Net whose weights have ranges and no codes."""
    with calibrating(tiny_unet(), MemoryRows.noisy(), tmp_path / "checkpoint", weights="int4") as session:
        minmax.WeightRanges().run(session)
        yield session


@settings(deadline=None, max_examples=60)
@given(exponents=st.lists(st.integers(-60, 60), min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_rows_in_float16_are_near_whatever_their_size_and_its_growth(
    tmp_path_factory: pytest.TempPathFactory, exponents: list[int], seed: int
) -> None:
    """To 11 bits of each value, or 24 of the largest there is; batches of any size after batches of any other."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(3, 4, generator=generator) * 2.0**exponent for exponent in exponents]
    recording = Recording(3 * len(batches), tmp_path_factory.mktemp("half"), 2**20, half=True)
    recording.add((batches[0][:2], 7), torch.arange(2))
    for number, batch in enumerate(batches):
        recording.add((batch, 7), torch.arange(3 * number, 3 * number + 3))
    kept, constant = recording.result().batch(torch.arange(3 * len(batches)))
    rows = torch.cat(batches)
    assert constant == 7
    assert kept.dtype == torch.float32
    assert recording.in_memory == 2 * rows.numel()
    # A rescaled batch is rounded once more.
    allowed = 2 * (rows.abs() * 2.0**-11 + rows.abs().max() * 2.0**-24)
    assert ((kept - rows).abs() <= allowed).all()


def test_zeros_integers_and_what_is_not_finite_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, 1.0], [torch.inf, -2.0], [torch.nan, 3.0]])
    numbers = torch.tensor([[2**40], [-1], [0]])
    recording = Recording(3, tmp_path, 2**20, half=True)
    for rows in (torch.arange(2), torch.arange(3)):
        recording.add((values[rows], numbers[rows]), rows)
    kept, whole = recording.result().batch(torch.arange(3))
    assert torch.equal(kept.nan_to_num(9), values.nan_to_num(9))
    assert torch.equal(whole, numbers)


def test_a_walk_in_float16_gives_what_one_in_float32_does(session: Session) -> None:
    rows = torch.arange(len(session.rows()))
    walks = [UnitWalk(session, half=half) for half in (False, True)]
    for unit in session.units:
        exact, near = (walk.problem(unit) for walk in walks)
        assert relative(near.targets.batch(rows), exact.targets.batch(rows)) < 1e-3
        assert near.targets.tensors[0].dtype == torch.float16
        for full, half in zip(exact.run.inputs.tensors, near.run.inputs.tensors, strict=True):
            assert half.nbytes <= full.nbytes


def test_steps_multiply_in_bfloat16_and_judge_in_float32(session: Session) -> None:
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def spy(layer: QuantizedLayer, args: Any, output: Tensor) -> None:
        seen[torch.is_grad_enabled()].add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: spy(module, args, output) if isinstance(module, QuantizedLayer) else None
    )
    try:
        AdaRound(steps=3, precision="bfloat16").run(session)
    finally:
        handle.remove()
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}


def test_roundings_learned_in_bfloat16_are_as_good(session: Session) -> None:
    """Each unit's held-out error, over that of rounding to nearest, from the same inputs."""
    gains: dict[str, list[float]] = {}
    for precision in PRECISIONS:
        for unit in list(session.units)[:4]:
            layers = session.quantized(session.units[unit])
            with session.weights_only():
                problem = UnitWalk(session, half=precision == "bfloat16").problem(unit)
                gain = round_unit(session, problem, layers, "same", 60, 1e-2, 0.01, 0.2, precision=precision)
            gains.setdefault(precision, []).append(gain)
            for layer in layers:
                for quantizer, _ in layer.weight_pairs():
                    quantizer.codes = None
    assert max(gains["bfloat16"]) < 1
    assert gains["bfloat16"] == pytest.approx(gains["float32"], rel=0.1)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="precision of round-weights 'float16'"):
        AdaRound(precision="float16")
    with pytest.raises(CapabilityError, match="no autocast on meta"):
        products_in("bfloat16", "meta")
    with products_in(None, "cpu"), products_in(None, "meta"):
        assert not torch.is_autocast_enabled("cpu")
