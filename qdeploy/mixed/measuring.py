"""The parts of a measurement of sensitivities: a pass over all layers, then one layer at a time."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qdeploy.calibrate.open_session import open_session
from qdeploy.calibrate.session import Session
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.mixed.estimate import first_order
from qdeploy.mixed.measure import Exact
from qdeploy.mixed.options import ACTIVATIONS, WEIGHTS, LayerOptions
from qdeploy.mixed.quantizers import options_of, set_quantizers
from qdeploy.mixed.ranking import LayerHarm, agreement, harm_db, ranked, score
from qdeploy.mixed.request import Work
from qdeploy.mixed.rows import TimestepRows, choose_rows
from qdeploy.model.inputs import denoise
from qdeploy.parts.folder import PartFolder
from qdeploy.parts.plan import Job
from qdeploy.parts.verb import ArtifactInParts
from qdeploy.recipe.formats import NONE, parse_format
from qdeploy.store.artifact import Sensitivity
from qdeploy.store.builder import Draft
from qdeploy.store.data_facts import AgreementFacts, SensitivityFacts
from qdeploy.store.files import save_tensors
from qdeploy.store.manifest import Notes
from qdeploy.store.measured import SensitivityMeasured
from qdeploy.system.estimate import Estimate
from qdeploy.system.progress import say

NOISE = "noise.safetensors"
SENSITIVITY = "sensitivity.json"
HARM = "harm.safetensors"


class Measuring(ArtifactInParts[Sensitivity]):
    """One call of `qdeploy.mixed.sensitivity.sensitivity`: its parts, and how they become an artifact.

    Part 0 is the first pass over all layers, each further part the second pass over one layer. A process finds the
    ranges of all quantizers before its first part.

    Args:
        work: what is to be measured.
        data: the calibration set.
        draft: of the artifact.
        rows: calibration rows to measure on.
        probes: backward passes of the first pass for each row.
        cheap: leave out the second pass.
        device: torch device.
        max_memory: bytes that recorded activations may take in memory.
        arguments: of the call, in JSON's types; None where other processes cannot open them.
    """

    def __init__(
        self,
        work: Work,
        data: CalibrationSet,
        draft: Draft[Sensitivity],
        rows: int,
        probes: int,
        cheap: bool,
        device: str,
        max_memory: int,
        arguments: dict[str, Any] | None,
    ) -> None:
        self.work, self.data, self.draft = work, data, draft
        self.probes, self.cheap, self.device, self.max_memory = probes, cheap, device, max_memory
        self._wanted_rows, self.arguments = rows, arguments

    @cached_property
    def session(self) -> Session:
        """The network, with its quantizers in place but not set; its journal is this process's own."""
        place = self.place / "sessions" / uuid.uuid4().hex
        own = replace(self.draft, output=place, overwrite=False, patience=0)
        return open_session(self.work.model, self.data, self.work.recipe, own, self.device, self.max_memory)

    @cached_property
    def rows(self) -> TimestepRows:
        """What is measured on."""
        return choose_rows(self.session, self._wanted_rows)

    @cached_property
    def subjects(self) -> list[LayerOptions]:
        """Layers with the quantizers to try."""
        with self.session.draft:  # found once in a process; what they are is in memory then
            set_quantizers(self.session, self.work)
        return options_of(self.session, self.work)

    @cached_property
    def _exact(self) -> Exact:
        assert self.subjects
        return Exact(self.session, self.rows)

    @property
    def job(self) -> Job:
        """The parts."""
        count = 1 if self.cheap else 1 + len(self.session.layers)
        return Job(
            "sensitivity",
            self.place,
            self.draft.request,
            count,
            self.output,
            self.arguments,
            self.make,
            self.device,
            "layers",
        )

    def make(self, number: int, folder: Path) -> None:
        """The first pass, or the second over one layer."""
        if number == 0:
            found = first_order(self.session, self.rows, self.subjects, self.probes)
            tensors = {f"{layer:04d}": noise for layer, noise in enumerate(found)}
        else:
            subject = self.subjects[number - 1]
            tensors = {"noise": self._exact.noise(subject), "signal": self._exact.signal}
        save_tensors({name: tensor.cpu().clone() for name, tensor in tensors.items()}, folder / NOISE)

    def announce(self) -> None:
        """Say what is going to be done, and how long it will take."""
        say(
            f"sensitivity of {self.work.name}: {len(self.session.layers)} layers in {', '.join(self.work.formats)}, "
            f"{len(self.rows.numbers)} rows at {len(self.rows.timesteps)} timesteps; about {self.estimate()}"
        )

    def estimate(self) -> Estimate:
        """From one timed call: range finding, then backward passes at about two calls each, then each option."""
        session, rows, work = self.session, self.rows, self.work
        batch = session.inputs(rows.numbers[: session.effort.batch])
        with torch.no_grad():
            for _ in range(2):
                began = time.perf_counter()
                denoise(session.denoiser, batch)
                call = (time.perf_counter() - began) / len(batch["timestep"].flatten())
        tried = len(work.formats) + (work.recipe.activations != NONE)
        first = len(rows.numbers) * (1 + tried + 2 * self.probes)
        left = sum(number > 0 for number in self.job.parts().missing())
        second = len(rows.numbers) * tried * left
        ranges = 0 if work.checkpoint else len(session.rows())
        sizes = sum(parameter.numel() * 4 for parameter in session.denoiser.parameters())
        return Estimate(call * (ranges + first + second), (2 + len(work.formats)) * sizes)

    def fill(self, parts: PartFolder) -> Sensitivity:
        """The artifact of all parts."""
        draft = self.draft
        first, *others = [load_file(files[NOISE]) for files in parts.each(self.make)]
        estimates = [first[name] for name in sorted(first)]
        measured = [part["noise"] for part in others] or None
        layers = _harms(self.session, self.subjects, estimates, measured)
        report = _report(self.work, self.rows, self.probes, layers, measured is not None)
        draft.json(SENSITIVITY, report)
        tensors = {"timesteps": self.rows.timesteps}
        for subject, noise in zip(self.subjects, measured or estimates, strict=True):
            tensors[f"{subject.path}.noise"] = noise
        if others:
            tensors["signal"] = others[0]["signal"]
        draft.tensors(HARM, lambda: tensors)
        facts = SensitivityFacts(
            component=self.work.model.name,
            class_name=self.work.model.class_name,
            model_sha256=self.work.model.sha256,
            layers=len(layers),
            formats=list(self.work.formats),
            exact=measured is not None,
            agreement=AgreementFacts(**report["agreement"]) if "agreement" in report else None,
        )
        took = {"cheap": parts.seconds(range(1)), "exact": parts.seconds(range(1, parts.count))}
        measured_here = SensitivityMeasured(seconds=parts.seconds() + draft.seconds, pass_seconds=took)
        return draft.finish(facts, measured_here, Notes(source=self.work.model.source))


def _harms(
    session: Session, subjects: list[LayerOptions], cheap: list[Tensor], exact: list[Tensor] | None
) -> list[LayerHarm]:
    layers = {layer.path: layer for layer in session.layers}
    found = []
    for number, subject in enumerate(subjects):
        layer = layers[subject.path]
        count = sum(map(prod, subject.layer.part_shapes()))
        harm = LayerHarm(
            layer.path, layer.unit, layer.reads, layer.macs, count, _by_format(subject, cheap[number])
        )
        found.append(replace(harm, exact=_by_format(subject, exact[number])) if exact else harm)
    return found


def _by_format(subject: LayerOptions, noise: Tensor) -> dict[str, dict[str, float]]:
    harm: dict[str, dict[str, float]] = {WEIGHTS: {}, ACTIVATIONS: {}}
    for option, row in zip(subject.options(), noise, strict=True):
        harm[option.part][option.format] = float(row.mean())
    return harm


def _in_short(layer: LayerHarm, formats: dict[str, str]) -> dict[str, Any]:
    """What a list of layers shows: the harm in the formats of the ranking, in dB; more is worse."""
    stored = parse_format(formats["weights"])
    harm = score(layer.best, **formats)
    bits = None if stored is None else stored.bits
    return {"name": layer.path, "bits": bits, "harm_db": round(-harm_db(harm), 2)}


def _report(
    work: Work, rows: TimestepRows, probes: int, layers: list[LayerHarm], exact: bool
) -> dict[str, Any]:
    formats = {"weights": work.recipe.weights, "activations": work.recipe.activations}
    rankings = {"cheap": ranked(layers, **formats, exact=False)}
    if exact:
        rankings["exact"] = ranked(layers, **formats, exact=True)
    order = rankings.get("exact", rankings["cheap"])
    by_path = {layer.path: layer.to_json() | _in_short(layer, formats) for layer in layers}
    return {
        "harm_is": "power of the prediction's error by that of the prediction, one layer quantized alone, mean "
        "over timesteps",
        "ranked_by": formats,
        "formats": list(work.formats),
        "rows": len(rows.numbers),
        "timesteps": rows.timesteps.tolist(),
        "probes": probes,
        "ranking": order,
        "rankings": rankings,
        "layers": [by_path[path] for path in order],
        **({"agreement": agreement(rankings["exact"], rankings["cheap"])} if exact else {}),
    }
