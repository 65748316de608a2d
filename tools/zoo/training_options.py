"""The options that all training scripts of the zoo share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def options(what: str, steps: int) -> argparse.Namespace:
    """Read ``--output --seed --steps --device`` and make the output folder."""
    parser = argparse.ArgumentParser(description=f"Train the {what}; a run that was stopped continues.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    return chosen
