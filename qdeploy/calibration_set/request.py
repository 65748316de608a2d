"""What to collect: a request, checked before anything large is loaded."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from qdeploy.calibration_set.recorder import chosen_calls
from qdeploy.model.folder import Model
from qdeploy.model.pipeline_index import INDEX, read_index
from qdeploy.model.requirements import require_libraries
from qdeploy.model.sampling import LARGEST_SEED, Sampling
from qdeploy.model.schedulers import scheduler_for
from qdeploy.system.errors import InvalidInputError, UsageError


@dataclass(frozen=True)
class Request:
    """What is to be collected; the arguments of `collect`, checked.

    Attributes:
        sampling: how images are sampled.
        keep: denoiser calls of each image to keep.
        samples: number of images.
        device: torch device.
    """

    sampling: Sampling
    keep: int
    samples: int
    device: str

    def __post_init__(self) -> None:
        for name in ("keep", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.sampling.seed + self.samples > LARGEST_SEED:
            raise UsageError(f"the seed must be a number from 0 to 2**63, not {self.sampling.seed}")

    def to_json(self) -> dict[str, Any]:
        """What determines the set, in the words of sets that exist."""
        value = {**self.sampling.to_json(), "samples": self.samples, "device": self.device}
        value |= {"steps": self.keep, "inference_steps": self.sampling.steps}
        for name in ("negative_prompts", "arguments", "inputs", "timesteps"):
            if not value[name]:
                del value[name]
        return value

    def batches(self) -> list[range]:
        """Numbers of the images in each batch."""
        return self.sampling.batches(self.samples)


def check_pipeline(model: Model, request: Request) -> None:
    """Find what is wrong with a request before anything large is loaded.

    Raises:
        UsageError: the pipeline or the scheduler cannot do what is asked.
        InvalidInputError: there is no pipeline, or a picture of the inputs is missing, broken or too large.
    """
    import diffusers

    sampling = request.sampling
    if sampling.folder is not None:
        sampling.folder.check(range(request.samples))
    index = read_index(model.path)
    if index is None:
        raise InvalidInputError(
            f"{model.path} holds a denoiser alone; collecting needs the whole pipeline's folder, with {INDEX}"
        )
    require_libraries(index)
    pipeline = getattr(diffusers, str(index.class_name), None)
    if pipeline is not None:
        known = inspect.signature(pipeline.__call__).parameters
        if "prompt" in known and sampling.prompts is None:
            raise UsageError(f"{pipeline.__name__} needs prompts: pass --prompt TEXT or --prompts FILE")
        if sampling.prompts is not None and not {"prompt", "class_labels"} & known.keys():
            raise UsageError(f"{pipeline.__name__} takes no prompts")
    listed = index.components.get("scheduler")
    shipped = None if listed is None else getattr(diffusers, listed.class_name, None)
    if shipped is None:
        return
    try:
        own = shipped.from_pretrained(model.path / "scheduler")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"the scheduler in {model.path} cannot be loaded: {error}") from error
    scheduler = scheduler_for(sampling, own)
    try:
        scheduler.set_timesteps(sampling.steps)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        if sampling.steps <= scheduler.config.get("num_train_timesteps", 0):
            return  # it needs more than a number, such as the size of the image: the pipeline knows
        raise UsageError(
            f"{type(scheduler).__name__} cannot make {sampling.steps} sampling steps: {error}"
        ) from error
    chosen_calls(len(scheduler.timesteps), request.keep)
