"""Parity: whether engine, ONNX graph and fake-quantized model compute one function.

Every bundle carries a probe: a few inputs with the outputs of the fake-quantized model. Engines add in another
order, so their floats differ in the last bits. A quantizer turns a difference in the last bit into a whole step
wherever a value is at the edge between two codes, and every such flip causes more of them in later layers. So a
row either agrees to all digits, or differs by about the error of rounding activations; there is nothing in
between. This error, the rounding floor, is measured: it is the distance between the subject's outputs for an
input and for the same input times 1.001, which moves every rounding and nothing else. A subject that stays within
it computes the function; one that does not is wrong. A row whose input is small compared with its quantizer's
step may keep all its codes, which is no information: it is moved further, until some code changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from qdeploy.engines.base import Engine
from qdeploy.engines.build import load_engine
from qdeploy.engines.measure import row_by_row
from qdeploy.engines.registry import find_backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.evaluate.metrics.sqnr import timestep_name
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import checkpoint_model, load_checkpoint
from qdeploy.store.artifact import Artifact, Bundle, Checkpoint, DenoiserArtifact, EngineFolder, open_artifact
from qdeploy.system.decibels import EXACT_DB, SAME_DB, distance, sqnr_by_row
from qdeploy.system.errors import InvalidInputError

# Kinds of artifacts in the order of the workflow, with their names in reports.
STAGES = {"checkpoint": "fake-quant", "onnx": "onnx", "engine": "engine"}
NUDGES = (1e-3, 4e-3, 1.6e-2)


@dataclass(frozen=True)
class RunnableArtifact:
    """Something that computes a denoiser's function.

    Attributes:
        artifact: an engine, an ONNX bundle or a checkpoint.
        denoiser: it, as a diffusers model.
        predict: its outputs for rows of inputs, each with its own timestep.
        sample: name of the input that holds the noisy sample.
        backend: the runtime that computes it.
    """

    artifact: DenoiserArtifact
    denoiser: nn.Module
    predict: Callable[[Mapping[str, Tensor]], Tensor]
    sample: str
    backend: str

    @property
    def stage(self) -> str:
        """``fake-quant``, ``onnx`` or ``engine``."""
        return STAGES[self.artifact.kind]


def open_subject(path: str | Path | Artifact, device: str = "cpu") -> RunnableArtifact:
    """Open an engine, an ONNX bundle (to be run by ONNX Runtime) or a checkpoint (by torch, on a device).

    Raises:
        InvalidInputError: it is of another kind, or damaged.
        CapabilityError: its runtime is not installed.
    """
    artifact = open_artifact(path, Checkpoint, Bundle, EngineFolder)
    # All three hold the denoiser's configuration in the same place.
    sample = list(signature(checkpoint_model(artifact).denoiser_class().forward).parameters)[1]
    if isinstance(artifact, Checkpoint):
        denoiser = load_checkpoint(artifact, device)
        return RunnableArtifact(artifact, denoiser, _predictor(denoiser, device), sample, "torch")
    engine = _run_bundle(artifact) if isinstance(artifact, Bundle) else load_engine(artifact)
    denoiser = cast("nn.Module", engine.as_denoiser())
    return RunnableArtifact(
        artifact, denoiser, lambda inputs: row_by_row(engine, inputs), sample, engine.backend
    )


def _run_bundle(bundle: Bundle) -> Engine:
    """A bundle, run by ONNX Runtime in place."""
    spec = EngineSpec.described_by(bundle.path, bundle.facts, "f32", files=bundle.files, sha256=bundle.sha256)
    return find_backend("onnxruntime").load(spec, None)


def _predictor(denoiser: nn.Module, device: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def predict(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            there = {name: value.to(device) for name, value in inputs.items()}
            return denoise(denoiser, there).cpu()

    return predict


def measure_parity(subject: RunnableArtifact, others: Sequence[RunnableArtifact] = ()) -> dict[str, Any]:
    """Compare the subject with the probe that is stored with it, and with other stages of the same workflow.

    Args:
        subject: what is checked.
        others: the ONNX bundle and the checkpoint that it was made from, where they are available.

    Returns:
        The `distance` from the probe's ``expected``, ``simulated`` or (where nothing is quantized)
        ``reference``; ``simulated_db`` and ``subject_db``, the median SQNR of both to full precision;
        ``rounding_floor_db``, the median distance that rounding alone causes; ``floors_db`` and
        ``by_row_db``, row by row with their ``timesteps``; and ``pairs`` of stages.

    Raises:
        InvalidInputError: a subject cannot take the probe, or computes NaN or Inf.
    """
    inputs, reference, simulated = subject.artifact.probe()
    expected = reference if simulated is None else simulated
    output = _finite(subject, subject.predict(inputs))
    floors = rounding_floors(subject, inputs, output)
    measured = distance(output, expected)
    measured |= {
        "expected": "reference" if simulated is None else "simulated",
        "backend": subject.backend,
        "subject_db": round(median(sqnr_by_row(output, reference)), 2),
        "rounding_floor_db": round(median(floors), 2),
        "timesteps": [timestep_name(t) for t in inputs["timestep"].flatten().tolist()],
        "by_row_db": [round(row, 2) for row in sqnr_by_row(output, expected)],
        "floors_db": [round(floor, 2) for floor in floors],
    }
    if simulated is not None:
        measured["simulated_db"] = round(median(sqnr_by_row(simulated, reference)), 2)
    outputs = {subject.stage: output}
    for other in others:
        _check_same_way(subject, other)
        outputs[other.stage] = _finite(other, other.predict(inputs))
    measured["pairs"] = dict(_pairs(outputs))
    return measured


def rounding_floors(subject: RunnableArtifact, inputs: Mapping[str, Tensor], output: Tensor) -> list[float]:
    """The rounding floor in dB of each row of inputs, from the subject's own outputs.

    Raises:
        InvalidInputError: the subject computes NaN or Inf.
    """
    floors = [EXACT_DB] * len(output)
    for nudge in NUDGES:
        unmoved = [row for row, floor in enumerate(floors) if floor >= SAME_DB]
        if not unmoved:
            break
        rows = {name: value[unmoved] for name, value in inputs.items()}
        rows[subject.sample] = rows[subject.sample] * (1 + nudge)
        moved = sqnr_by_row(_finite(subject, subject.predict(rows)), output[unmoved])
        for row, floor in zip(unmoved, moved, strict=True):
            floors[row] = floor
    return floors


def _pairs(outputs: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    ordered = [stage for stage in STAGES.values() if stage in outputs]
    for one, other in combinations(ordered, 2):
        yield f"{one} vs {other}", distance(outputs[other], outputs[one])


def _check_same_way(subject: RunnableArtifact, other: RunnableArtifact) -> None:
    """Check that one was made from the other.

    Raises:
        InvalidInputError: they belong to different models or calibrations.
    """
    one, two = subject.artifact, other.artifact
    if one.kind == two.kind:
        raise InvalidInputError(
            f"{one.path} and {two.path} are both of kind {one.kind!r}: there is no pair to compare"
        )
    linked = one.made_from.get(two.kind) == two.sha256
    if not linked and two.made_from.get(one.kind) != one.sha256:
        raise InvalidInputError(
            f"{one.path} was not made from {two.path}: name the one that it was made from"
        )


def _finite(subject: RunnableArtifact, output: Tensor) -> Tensor:
    if not bool(output.isfinite().all()):
        raise InvalidInputError(f"{subject.artifact.path} computes NaN or Inf for its own probe")
    return output
