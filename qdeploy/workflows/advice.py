"""What a calibration is told of the machine that it begins on."""

from __future__ import annotations

from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.targets import find_target
from qdeploy.system.machine import has_bf16, int8_sums_saturate
from qdeploy.system.progress import say

HOURS_S = 3600  # of a forecast, from which on half of it is worth an option


def advise(recipe: Recipe, device: str, seconds: float) -> None:
    """Say what would be faster, or is slower than elsewhere.

    Args:
        recipe: resolved.
        device: torch device of the calibration.
        seconds: its forecast.
    """
    wide = recipe.weights == "int8" and recipe.activations != "none"
    if wide and "openvino" in find_target(recipe.target).backends and int8_sums_saturate():
        say(
            "this processor has no VNNI, so engines compute 8-bit weights in floats here; int7 weights run in int8"
        )
    multiplies = has_bf16() if device == "cpu" else device.startswith("cuda")
    asked = [stage.options.get("precision") for stage in recipe.stages if stage.name == "round-weights"]
    if "bfloat16" in asked and not multiplies:
        say(f"{device} has no products in bfloat16 here: precision: bfloat16 makes round-weights slower")
    elif asked and not all(asked) and multiplies and seconds > HOURS_S:
        say("with --set round-weights.precision=bfloat16 a learning step takes about 0.6 of its time here")
