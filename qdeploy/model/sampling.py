"""How a pipeline is sampled: the same options for collect, sample, check, report and benchmark."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from qdeploy.model.input_folder import InputFolder
from qdeploy.model.prompts import PromptFile
from qdeploy.model.timesteps import Timesteps, read_timesteps
from qdeploy.store.facts import SampledFacts
from qdeploy.system.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

LARGEST_SEED = 2**63


def _option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. What is None is left to the pipeline.

    Attributes:
        steps: sampling steps; some schedulers call the denoiser more often.
        scheduler: a name of `qdeploy.model.schedulers`, or a diffusers class; the model's own if None.
        guidance: classifier-free guidance scale.
        prompts: prompts or, for class-conditional models, class numbers; used in turn. Many may stay in a file
            (`qdeploy.model.prompts.PromptFile`).
        negative_prompts: what images shall not show: one for all images, or as many as there are prompts.
        eta: DDIM's share of fresh noise in each step, 0 to 1.
        seed: image i is sampled from ``seed + i``.
        batch: images that are sampled together; memory grows with it.
        height: height of the images in pixels, where the pipeline offers a choice.
        width: width of the images in pixels.
        inputs: a folder with further inputs, such as images and masks (see `qdeploy.model.input_folder`).
        arguments: further arguments of the pipeline by name, such as ``num_frames``.
        timesteps: those to sample at, descending; or ``quad``, DDIM's quadratic choice of as many as ``steps``.

    Raises:
        UsageError: an impossible number, or an empty list of prompts.
        InvalidInputError: the folder of inputs cannot be used.
    """

    steps: int = _option("Sampling steps.", 50)
    scheduler: str | None = _option("ddim, pndm, euler, dpm++, ... or a diffusers class.")
    guidance: float | None = _option("Classifier-free guidance scale.")
    prompts: Sequence[str] | None = None
    negative_prompts: Sequence[str] | None = None
    eta: float | None = _option("DDIM's eta.")
    seed: int = _option("Where all randomness comes from.", 0)
    batch: int = _option("Images at a time.", 16)
    height: int | None = _option("Height of the images in pixels.")
    width: int | None = _option("Width of the images in pixels.")
    inputs: str | Path | None = field(
        default=None, metadata={"help": "Folder of inputs: image/, mask_image/, prompt.txt, ..."}
    )
    arguments: Mapping[str, Any] | None = None
    timesteps: Timesteps | None = _option("Timesteps to sample at: quad, or a list: 981,961,...")  # noqa: RUF009 - an alias

    def __post_init__(self) -> None:
        if self.timesteps is not None:
            chosen = read_timesteps(self.timesteps)
            object.__setattr__(self, "timesteps", chosen)
            if not isinstance(chosen, str):
                object.__setattr__(self, "steps", len(chosen))
        for name in ("steps", "batch", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name in ("guidance", "eta"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} is a finite number, not {value}")
        if not 0 <= self.seed < LARGEST_SEED:
            raise UsageError(f"the seed must be a number from 0 to 2**63, not {self.seed}")
        if isinstance(self.prompts, Mapping):  # of a plan
            object.__setattr__(self, "prompts", PromptFile(**self.prompts))
        for name in ("prompts", "negative_prompts"):
            given = getattr(self, name)
            if isinstance(given, PromptFile):
                continue
            if isinstance(given, str):
                given = (given,)
            if given is not None:
                if not given:
                    raise UsageError(f"the list of {name.replace('_', ' ')} is empty")
                object.__setattr__(self, name, tuple(map(str, given)))
        if self.prompts is None and self.folder is not None and (lines := self.folder.lines("prompt")):
            object.__setattr__(self, "prompts", tuple(lines))
        negative = len(self.negative_prompts or ())
        if negative > 1 and negative != len(self.prompts or ()):
            raise UsageError(
                f"{negative} negative prompts do not go with {len(self.prompts or ())} prompts: give one, or as many"
            )

    @cached_property
    def folder(self) -> InputFolder | None:
        """The folder of inputs."""
        return None if self.inputs is None else InputFolder(Path(self.inputs))

    def inputs_of(self, images: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline from the folder of inputs, for some images by their numbers.

        Raises:
            InvalidInputError: a picture is missing, broken or too large.
        """
        found = {} if self.folder is None else self.folder.arguments(images)
        return {name: value for name, value in found.items() if name != "prompt"}

    def to_json(self) -> dict[str, Any]:
        """What determines the images, with the content of the folder of inputs in place of its path."""
        value = asdict(self)
        inputs = None if self.folder is None else self.folder.sha256
        return {**value, "inputs": inputs, "prompts": self.prompts_json()}

    def prompts_json(self) -> list[str] | dict[str, Any] | None:
        """The prompts in JSON's types; of those that stay in a file their number and hash."""
        if self.prompts is None:
            return None
        return self.prompts.to_json() if isinstance(self.prompts, PromptFile) else list(self.prompts)

    def arguments_json(self) -> dict[str, Any]:
        """Its fields in JSON's types: ``Sampling(**fields)`` is the same."""
        value = asdict(self)
        if isinstance(self.prompts, PromptFile):
            value["prompts"] = self.prompts.arguments_json()
        return {**value, "inputs": None if self.inputs is None else str(Path(self.inputs).resolve())}

    def prompts_of(self, images: Sequence[int]) -> list[str] | None:
        """A prompt for each of some images, by their numbers; the list begins anew where it ends."""
        return _in_turn(self.prompts, images)

    def negative_prompts_of(self, images: Sequence[int]) -> list[str] | None:
        """As `prompts_of`, for the negative prompts."""
        return _in_turn(self.negative_prompts, images)

    def batches(self, samples: int) -> list[range]:
        """Numbers of the images in each batch."""
        starts = range(0, samples, self.batch)
        return [range(first, min(first + self.batch, samples)) for first in starts]

    def facts(self, scheduler: str, guidance: float | None) -> SampledFacts:
        """What a calibration set says of how it was sampled, so that what is made from it can be sampled alike.

        Args:
            scheduler: the class that was used.
            guidance: the scale that was used.
        """
        size = {"height": self.height, "width": self.width}
        arguments = dict(self.arguments or {}) or None
        return SampledFacts(scheduler=scheduler, guidance=guidance, eta=self.eta, arguments=arguments, **size)

    def like(self, known: SampledFacts | None) -> Sampling:
        """The same, with what it leaves open as the calibration set of an artifact was sampled.

        Args:
            known: what the artifact says. Those of before this was recorded are sampled with DDIM.
        """
        known = known or SampledFacts(scheduler="DDIMScheduler")
        names = ("scheduler", "guidance", "height", "width", "eta")
        own = {name: getattr(known, name) for name in names if getattr(self, name) is None}
        arguments = {**(known.arguments or {}), **(self.arguments or {})}
        return replace(self, **own, arguments=arguments or None)

    def sized_like(self, known: SampledFacts | None) -> Sampling:
        """As `like`, of the size and the pipeline's arguments alone: what the graph of an engine is fixed to."""
        found = self.like(known)
        return replace(self, height=found.height, width=found.width, arguments=found.arguments)

    def changed(self, given: Mapping[str, Any]) -> Sampling:
        """The same with some options replaced.

        Raises:
            UsageError: an impossible number, or an empty list of prompts.
            TypeError: there is no such option.
        """
        unknown = given.keys() - {each.name for each in fields(self)}
        if unknown:
            raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
        return replace(self, **given)


# What each verb samples with where nothing else is asked for. Checks use the same scheduler whatever the model's
# own, so that numbers of several models compare.
COLLECTING = Sampling(steps=100)
SAMPLING = Sampling()
CHECKING = Sampling(scheduler="ddim", seed=1)
AS_COLLECTED = Sampling(seed=1)  # what is open is done as for the calibration set


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments of verbs."""

    steps: int
    scheduler: str | None
    guidance: float | None
    prompts: Sequence[str] | None
    negative_prompts: Sequence[str] | None
    eta: float | None
    seed: int
    batch: int
    height: int | None
    width: int | None
    inputs: str | Path | None
    arguments: Mapping[str, Any] | None
    timesteps: Timesteps | None


def sampled(defaults: Sampling) -> Callable[[F], F]:
    """Make ``inspect.signature`` and ``help`` show the fields of `Sampling` in place of ``**options``.

    Args:
        defaults: what the verb samples with by default.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        shown = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(defaults, each.name),
                annotation=each.type,
            )
            for each in fields(Sampling)
            if each.name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate


def renamed(options: dict[str, Any], old: str, new: str) -> None:
    """Take an option under its old name, with a warning."""
    if old in options:
        warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=3)
        options[new] = options.pop(old)


def with_old_names(options: dict[str, Any], keep: int) -> tuple[dict[str, Any], int]:
    """Take options of the grammar before, in which ``steps`` was what is kept of ``inference_steps``.

    Returns:
        The options in today's names, and how many calls to keep.
    """
    if "inference_steps" not in options:
        return options, keep
    keep = options.pop("steps", keep)
    renamed(options, "inference_steps", "steps")
    return options, keep


def _in_turn(listed: Sequence[str] | None, images: Sequence[int]) -> list[str] | None:
    return None if listed is None else [listed[image % len(listed)] for image in images]
