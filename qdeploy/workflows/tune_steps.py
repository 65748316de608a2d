"""The steps of ``tune``: engines of several forms, and trials of them with several schedules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qdeploy.evaluate.cached_json import cached_result
from qdeploy.export.run import export
from qdeploy.model.media import IMAGES
from qdeploy.model.pipeline import sample_images
from qdeploy.model.sampling import CHECKING, Sampling
from qdeploy.model.schedulers import scheduler_for
from qdeploy.sampling.sample import sample
from qdeploy.sampling.source_pipeline import open_pipeline, pipeline_of
from qdeploy.store.artifact import CalibrationFolder, EngineFolder
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.machine import machine
from qdeploy.workflows.auto_steps import LADDERS, Steps

FLOAT, INT8, PLACED, WITH_DECODER = "float", "int8", "int8-placed", "int8-decoder"
LARGEST_DB = 100.0  # of images that are equal


@dataclass(frozen=True)
class Trial:
    """One way to make pictures, measured.

    Attributes:
        engine: folder of the engine.
        form: ``float``, ``int8``, ``int8-placed`` (int8 where it is measured to pay) or ``int8-decoder`` (the
            autoencoder's decoder too).
        scheduler: a name of `qdeploy.model.schedulers`.
        steps: sampling steps.
        psnr_db: of its images to the reference's on the same seeds.
        seconds: by the clock for an image, the median.
    """

    engine: str
    form: str
    scheduler: str
    steps: int
    psnr_db: float
    seconds: float


class Bench:
    """Engines of one model, and the pictures that they are compared with.

    Args:
        work: the verbs of ``auto``, with the model and the output's folder.
        reference_steps: sampling steps of the reference, with the model's own scheduler and in full precision.
    """

    def __init__(self, work: Steps, reference_steps: int) -> None:
        self.work, self.reference_steps = work, reference_steps
        self._data: CalibrationFolder | None = None

    def sampling(self, scheduler: str | None, steps: int) -> Sampling:
        """How a trial is sampled: one image at a time, from seeds that no calibration has seen."""
        return replace(
            self.work.sampling, scheduler=scheduler, steps=steps, seed=CHECKING.seed + 2**20, batch=1
        )

    def reference(self) -> Tensor:
        """Full precision in torch, ``[N, C, H, W]`` in [0, 1].

        Raises:
            InvalidInputError: the model makes no images.
        """
        made = sample(
            self.work.model.path,
            self.work.output / "reference",
            self.sampling(None, self.reference_steps),
            samples=self.work.samples,
        )
        file = made.path / f"{IMAGES}.safetensors"
        if not file.is_file():
            raise InvalidInputError(
                f"{self.work.model.path} makes no images: their PSNR is what tune goes by"
            )
        return load_file(file)[IMAGES].float() / 255

    def engine(self, form: str) -> EngineFolder:
        """The engine of a form; a finished one is taken up.

        Raises:
            CheckFailed: a decoder at W8A8 is too far from float.
            InvalidInputError: there is no decoder that could be quantized.
        """
        from qdeploy.engines.build import build_engine

        out, rung = self.work.output, LADDERS[self.work.backend][0]
        common: dict[str, Any] = {"backend": self.work.backend, "precision": self.work.precision}
        if form == FLOAT:
            return build_engine(export(self.work.model.path, out / "float-onnx"), out / FLOAT, **common)
        if form == INT8:
            return self.work.engine(rung, self.data)
        self.work.engine(rung, self.data)
        if form == PLACED:
            common |= {"optimize_for": "latency"}
        else:
            common |= {"components": {"vae": "w8a8"}, "calibration": self.data}
        return build_engine(out / f"{rung.recipe}-onnx", out / form, allow_inaccurate=True, **common)

    @property
    def data(self) -> CalibrationFolder:
        """The calibration set, collected when it is first needed."""
        if self._data is None:
            self._data = self.work.collect()
        return self._data

    def has_decoder(self) -> bool:
        """Whether the pipeline has an autoencoder whose decoder may be quantized."""
        checkpoint_bundle = self.work.output / f"{LADDERS[self.work.backend][0].recipe}-onnx"
        return (checkpoint_bundle / "vae_decoder" / "model.onnx").is_file()

    def trials(
        self, form: str, schedules: list[tuple[str, int]], reference: Tensor, progress: Iterator[None]
    ) -> list[Trial]:
        """One engine with several schedules; what an earlier run has measured is not measured again."""
        engine, pipeline = self.engine(form), None
        found = []
        for scheduler, steps in schedules:
            sampling = self.sampling(scheduler, steps)

            def measure(sampling: Sampling = sampling) -> dict[str, Any]:
                nonlocal pipeline
                if pipeline is None:
                    whole = pipeline_of(engine, self.work.model.path)
                    own = pipeline_of(engine, None) if engine.facts.pipeline else whole
                    pipeline = open_pipeline(engine, own, sampling, "none", "cpu")
                    sample_images(pipeline, replace(sampling, steps=2), [0])  # compiles, and is not counted
                pipeline.scheduler = scheduler_for(sampling, pipeline.scheduler)
                return _measured(pipeline, sampling, reference)

            key = [engine.sha256, repr(sampling), self.reference_steps, len(reference), machine()]
            file = self.work.output / "measured" / f"{form}-{scheduler}-{steps}.json"
            told = cached_result(file, key, measure)
            found.append(Trial(str(engine.path), form, scheduler, steps, told["psnr_db"], told["seconds"]))
            next(progress, None)
        return found


def _measured(pipeline: Any, sampling: Sampling, reference: Tensor) -> dict[str, Any]:
    """PSNR in dB over all images, and the median of their seconds."""
    seconds, errors = [], []
    for number, exact in enumerate(reference):
        began = time.perf_counter()
        values = sample_images(pipeline, sampling, [number]).values[0]
        seconds.append(time.perf_counter() - began)
        errors.append((values.float().clamp(0, 1) - exact).square().mean())
    error = float(torch.stack(errors).double().mean())
    psnr = LARGEST_DB if error <= 10 ** (-LARGEST_DB / 10) else -10 * float(torch.tensor(error).log10())
    return {"psnr_db": round(psnr, 2), "seconds": round(median(seconds), 5)}
