"""What a calibration says of the machine: only what is so, and only where something follows from it."""

from __future__ import annotations

import pytest

from qdeploy.calibrate.methods.gptq import GPTQ
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import Stage
from qdeploy.workflows import advice

HALF, SLOWER = "--set round-weights.precision=bfloat16", "makes round-weights slower"


@pytest.mark.parametrize(
    ("rounding", "device", "bf16", "hours", "said"),
    [
        (AdaRound(), "cpu", True, 2.0, HALF),
        (AdaRound(), "cuda:1", False, 2.0, HALF),
        (AdaRound(), "cpu", True, 0.5, ""),
        (AdaRound(), "cpu", False, 2.0, ""),
        (GPTQ(), "cpu", True, 2.0, ""),
        (AdaRound(precision="bfloat16"), "cpu", True, 2.0, ""),
        (AdaRound(precision="float32"), "cpu", True, 2.0, ""),
        (AdaRound(precision="bfloat16"), "cpu", False, 0.1, SLOWER),
    ],
    ids=str,
)
def test_bfloat16_is_named_where_it_saves_hours_or_costs_time(
    rounding: Stage,
    device: str,
    bf16: bool,
    hours: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(advice, "has_bf16", lambda: bf16)
    monkeypatch.setattr(advice, "int8_sums_saturate", lambda: False)
    recipe = resolve_recipe(
        weights="int4", activations="int8", stages=[WeightRanges("lp"), rounding, ActivationRanges("lp")]
    )
    advice.advise(recipe, device, hours * 3600)
    told = "".join(capsys.readouterr())
    assert said in told
    assert bool(said) == bool(told.strip())
