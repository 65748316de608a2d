"""What a calibration may cost, for both sides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Bits and steps.

    Attributes:
        weight_bits: of asymmetric weights.
        activation_bits: of asymmetric activations.
        rounding: steps for each unit's roundings.
        scales: steps for each unit's activation scales.
        tuning: steps of the whole network for each of QuEST's alignments.
        batch: rows of a step.
    """

    weight_bits: int
    activation_bits: int
    rounding: int
    scales: int
    tuning: int = 200
    batch: int = 32
