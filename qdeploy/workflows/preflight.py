"""The verb ``preflight``: what will work with a model, what it costs and what will not work, before any long run.

Seconds for a small model: it is loaded, its pipeline is run with one computed denoiser call, the call is repeated,
the network's structure is searched, and it is traced into ONNX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.survey import Survey, survey
from qdeploy.export.trace import trace
from qdeploy.model.folder import Model, open_model
from qdeploy.model.inputs import attach_form
from qdeploy.model.pipeline import sample_images
from qdeploy.model.sampling import COLLECTING, Sampling, SamplingOptions, sampled
from qdeploy.model.schedulers import scheduler_for
from qdeploy.model.weights import stored_types
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.network.roles import Structure, find_structure
from qdeploy.quant.modes import full_precision
from qdeploy.system.errors import QDeployError
from qdeploy.system.estimate import readable_size, readable_time
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from typing_extensions import Unpack

EXAMPLES = 2  # rows to trace with


@dataclass(frozen=True)
class StepResult:
    """One thing that was tried.

    Attributes:
        step: what.
        works: whether it does; None if it was not reached.
        detail: what it came to, or why it does not work.
        seconds: how long it took.
    """

    step: str
    works: bool | None
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class PreflightResult:
    """What was found about a model.

    Attributes:
        path: the model's folder.
        findings: in the order of the steps.
        error: why the first step that does not work does not; None if all do.
    """

    path: Path
    findings: list[StepResult]
    error: QDeployError | None = None

    @property
    def passed(self) -> bool:
        """Whether everything works."""
        return all(finding.works for finding in self.findings)

    @property
    def problem(self) -> str | None:
        """Why the first step that does not work does not; None if all do."""
        return None if self.error is None else str(self.error)

    def require(self) -> None:
        """Say what was found, and go on only if everything works.

        Raises:
            QDeployError: what the first step that does not work has raised.
        """
        say(self.table())
        if self.error is not None:
            raise self.error

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy preflight --json``."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "steps": [vars(finding) for finding in self.findings],
        }

    def table(self) -> str:
        """The findings for people."""
        words = {True: "works", False: "fails", None: "not tried"}
        width = max(len(each.step) for each in self.findings)
        return "\n".join(
            f"{each.step:{width}}  {words[each.works]:9}  {each.detail}" for each in self.findings
        )


@sampled(COLLECTING)
def preflight(
    model: str | Path | Model, sampling: Sampling | None = None, **options: Unpack[SamplingOptions]
) -> PreflightResult:
    """Try everything that a calibration and an export need, on one image and one denoiser call.

    Args:
        model: a diffusers pipeline's folder, a zoo model's name or a Hub id.
        sampling: how the calibration set is going to be sampled.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        What works and what not. Nothing is written.

    Raises:
        InvalidInputError: there is no model.
    """
    model = model if isinstance(model, Model) else open_model(model)
    asked = (sampling or COLLECTING).changed(dict(options))
    return _Preflight(model, with_shipped_prompts(asked, model.path)).run()


def check_traceable(denoiser: nn.Module, row: Mapping[str, Tensor]) -> None:
    """Make sure that a network can become an ONNX graph, before hours are spent on its calibration.

    Args:
        denoiser: the network, quantized or not; it is traced in full precision.
        row: inputs of one call.

    Raises:
        InvalidInputError: it cannot.
    """
    with full_precision(denoiser):
        trace(denoiser, row)


class _Preflight:
    def __init__(self, model: Model, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.findings: list[StepResult] = []
        self.denoiser: nn.Module
        self.pipeline: Any
        self.plan: Survey
        self.structure: Structure

    def run(self) -> PreflightResult:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("weights", self._load),
            ("pipeline", self._open),
            ("denoiser calls, and one repeated", self._survey),
            ("structure", self._structure),
            ("trace into ONNX", self._trace),
        ]
        failure: QDeployError | None = None
        for name, step in steps:
            if failure is not None:
                self.findings.append(StepResult(name, None, "the step before does not work"))
                continue
            began = time.perf_counter()
            try:
                works, detail = True, step()
            except QDeployError as error:
                works, detail, failure = False, str(error), error
            self.findings.append(StepResult(name, works, detail, time.perf_counter() - began))
        return PreflightResult(self.model.path, self.findings, failure)

    def _load(self) -> str:
        self.denoiser = self.model.load()
        parameters = sum(parameter.numel() for parameter in self.denoiser.parameters())
        files, types = self.model.weights, ", ".join(stored_types(self.model.weights))
        unread = [file.name for file in self.model.weight_files.unread]
        said = f"{self.model.class_name}, {parameters / 1e6:.1f} M parameters, {len(files)} files of {types}"
        return said + (f"; not read: {', '.join(unread)}" if unread else "")

    def _open(self) -> str:
        self.pipeline = self.model.pipeline(self.denoiser)
        self.pipeline.scheduler = scheduler_for(self.sampling, self.pipeline.scheduler)
        return f"{type(self.pipeline).__name__} with {type(self.pipeline.scheduler).__name__}"

    def _survey(self) -> str:
        sampling = replace(self.sampling, batch=1)

        def run(images: range) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(sampling.seed)
                sample_images(self.pipeline, sampling, images, latents_alone=True)

        self.plan = survey(self.pipeline, self.denoiser, run, keep=EXAMPLES)
        attach_form(self.denoiser, self.plan.saved_form)
        constants = self.plan.form.constants
        each = f"{self.plan.branches} calls" if self.plan.branches > 1 else "a call"
        said = f"{self.plan.steps} steps with {each} each, about {readable_time(self.plan.seconds)} a call; "
        said += f"inputs {', '.join(self.plan.layout)}"
        return said + (f"; constants {', '.join(constants)}" if constants else "")

    def _structure(self) -> str:
        self.structure = find_structure(self.denoiser, self.plan.example_rows())
        macs = sum(layer.macs for layer in self.structure.layers)
        temporal = sum(layer.temporal for layer in self.structure.layers)
        found = self.structure
        return (
            f"{len(found.layers)} layers in {len(found.units)} units, {temporal} of them on the timestep alone, "
            f"{len(found.attentions)} attentions, {macs / 1e9:.3g} G multiplications a row"
        )

    def _trace(self) -> str:
        graph = trace(self.denoiser, self.plan.example_rows())
        size = sum(
            value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value
        )
        free = [value.name for value in graph.graph.inputs if value.shape and "batch" in str(value.shape[0])]
        rows = "any number of rows" if free else "one number of rows alone"
        return f"{len(list(graph.graph))} nodes, {readable_size(size)}, {rows}"
