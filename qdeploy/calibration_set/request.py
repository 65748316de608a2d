"""What to collect: a request, checked before anything large is loaded."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

from qdeploy.calibration_set.recorder import chosen_calls
from qdeploy.model.folder import INDEX, Model
from qdeploy.model.schedulers import make_scheduler
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_files

DESCRIBING = ("*.json", "*.txt", "*.model")
WEIGHTS = ("*.safetensors",)
WITHOUT_INFLUENCE = ("vae", "safety_checker")  # their weights do not shape what the denoiser is given


@dataclass(frozen=True)
class Request:
    """What is to be collected; the arguments of `collect`, checked."""

    steps: int
    samples: int
    inference_steps: int
    scheduler: str | None
    eta: float | None
    prompts: tuple[str, ...] | None
    guidance: float | None
    seed: int
    batch: int
    height: int | None
    width: int | None
    device: str

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "inference_steps", "batch", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
        if self.prompts is not None and not self.prompts:
            raise UsageError("the list of prompts is empty")
        if not 0 <= self.seed < 2**63 - self.samples:
            raise UsageError(f"the seed must be a number from 0 to 2**63, not {self.seed}")

    def batches(self) -> list[range]:
        """Numbers of the images in each batch."""
        starts = range(0, self.samples, self.batch)
        return [range(first, min(first + self.batch, self.samples)) for first in starts]

    def prompts_of(self, images: range) -> list[str] | None:
        """A prompt for each image; the list begins anew where it ends."""
        if self.prompts is None:
            return None
        return [self.prompts[image % len(self.prompts)] for image in images]


def check_pipeline(model: Model, request: Request) -> None:
    """Find what is wrong with a request before anything large is loaded.

    Raises:
        UsageError: the pipeline or the scheduler cannot do what is asked.
        InvalidInputError: there is no pipeline.
    """
    import diffusers

    if not model.has_pipeline:
        raise InvalidInputError(
            f"{model.path} holds a denoiser alone; collecting needs the whole pipeline's folder, with {INDEX}"
        )
    index = _index(model)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if pipeline is not None:
        known = inspect.signature(pipeline.__call__).parameters
        if "prompt" in known and request.prompts is None:
            raise UsageError(f"{pipeline.__name__} needs prompts: pass --prompts FILE")
        if request.prompts is not None and not {"prompt", "class_labels"} & known.keys():
            raise UsageError(f"{pipeline.__name__} takes no prompts")
    shipped = getattr(diffusers, str(index.get("scheduler", [None, None])[1]), None)
    if shipped is None:
        return
    try:
        own = shipped.from_pretrained(model.path / "scheduler")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"the scheduler in {model.path} cannot be loaded: {error}") from error
    scheduler = make_scheduler(request.scheduler, own)
    if request.eta is not None and "eta" not in inspect.signature(scheduler.step).parameters:
        raise UsageError(f"{type(scheduler).__name__} takes no eta")
    try:
        scheduler.set_timesteps(request.inference_steps)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        if request.inference_steps <= scheduler.config.get("num_train_timesteps", 0):
            return  # it needs more than a number, such as the size of the image: the pipeline knows
        raise UsageError(
            f"{type(scheduler).__name__} cannot make {request.inference_steps} inference steps: {error}"
        ) from error
    chosen_calls(len(scheduler.timesteps), request.steps)


def pipeline_sha256(model: Model) -> str:
    """Identity of what shapes the denoiser's inputs from outside: scheduler, tokenizer, text encoder."""
    files = {INDEX: model.path / INDEX}
    for name in sorted(_index(model).keys() - {model.component}):
        for pattern in DESCRIBING if name in WITHOUT_INFLUENCE else (*DESCRIBING, *WEIGHTS):
            found = (model.path / name).rglob(pattern)
            files |= {file.relative_to(model.path).as_posix(): file for file in found}
    return sha256_files(files)


def _index(model: Model) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((model.path / INDEX).read_text())
    return index
