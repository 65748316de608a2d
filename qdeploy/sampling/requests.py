"""Images on request: what the adapters to model servers share. Prompts and seeds in, pictures out, many at once.

A request's picture is the one that ``qdeploy sample`` makes for its seed, whatever it is batched with. A request that
makes no sense is an error of its own and spoils no other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from qdeploy.model.media import IMAGES
from qdeploy.model.pipeline import generate
from qdeploy.model.sampling import LARGEST_SEED, SAMPLING
from qdeploy.sampling.media_files import as_stored
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.store.artifact import EngineFolder, open_artifact
from qdeploy.system.errors import InvalidInputError, QDeployError, UsageError

MOST_STEPS, LONGEST_PROMPT = 1000, 10_000  # the latter in bytes of UTF-8
SEED, PROMPT, NEGATIVE, STEPS, GUIDANCE = "SEED", "PROMPT", "NEGATIVE_PROMPT", "STEPS", "GUIDANCE"
RESULT = "IMAGES"
# Inputs of a served pipeline by the types of the Open Inference Protocol; all but the seed may be left out.
INPUTS = {SEED: "INT64", PROMPT: "BYTES", NEGATIVE: "BYTES", STEPS: "INT32", GUIDANCE: "FP32"}


@dataclass(frozen=True)
class ImageRequest:
    """One picture.

    Attributes:
        seed: where its noise comes from.
        prompt: what it shows, or the number of a class; None where the pipeline takes neither.
        negative_prompt: what it shall not show.
        steps: sampling steps.
        guidance: classifier-free guidance scale; the pipeline's own if None.

    Raises:
        UsageError: a number is impossible, or a prompt too long.
    """

    seed: int
    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int = SAMPLING.steps
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < LARGEST_SEED:
            raise UsageError(f"the seed must be a number from 0 to 2**63, not {self.seed}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(f"the number of steps must be from 1 to {MOST_STEPS}, not {self.steps}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UsageError(f"guidance must be a finite number from 0 on, not {self.guidance}")
        for text in (self.prompt, self.negative_prompt):
            if text is not None and len(text.encode()) > LONGEST_PROMPT:
                raise UsageError(
                    f"a prompt may have {LONGEST_PROMPT} bytes, and this one has {len(text.encode())}"
                )


def read_requests(columns: Mapping[str, Sequence[Any]]) -> list[ImageRequest]:
    """The pictures that a request of a server asks for.

    Args:
        columns: a value for each picture by the name of the input; those of `INPUTS`, of which only the seed has to
            be there.

    Raises:
        UsageError: an input is unknown, missing or of another length, or a value is impossible.
    """
    if unknown := columns.keys() - INPUTS.keys():
        raise UsageError(f"there is no input {sorted(unknown)[0]}: there are {', '.join(INPUTS)}")
    if not (seeds := columns.get(SEED)):
        raise UsageError(f"the input {SEED} is missing: one number for each image")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"all inputs need one value for each image, and have {lengths}")
    rows = [{name: values[row] for name, values in columns.items()} for row in range(len(seeds))]
    return [
        ImageRequest(
            int(row[SEED]),
            _text(row.get(PROMPT)),
            _text(row.get(NEGATIVE)),
            int(row.get(STEPS, SAMPLING.steps)),
            None if GUIDANCE not in row else float(row[GUIDANCE]),
        )
        for row in rows
    ]


def _text(value: Any) -> str | None:
    if not isinstance(value, bytes):
        return value if value is None else str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"a prompt is no UTF-8: {error}") from error


class ServedPipeline:
    """A pipeline folder that answers requests. Any number of threads may call it; they take turns.

    Args:
        folder: of an engine that is a whole pipeline.
        threads: of every engine; those of the build if None.

    Raises:
        InvalidInputError: it is none, or damaged.
        CapabilityError: its runtime is not installed, or this machine cannot run it.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        artifact = open_artifact(folder, EngineFolder)
        self._sampling = SAMPLING.sized_like(artifact.facts.sampled)
        self._pipeline = load_pipeline(artifact, threads=threads)
        self._lock = Lock()  # a diffusers pipeline keeps the state of its schedule

    def __call__(self, requests: Sequence[ImageRequest]) -> list[Tensor | QDeployError]:
        """The pictures, uint8 ``[H, W, C]``, in the order of the requests; in place of one what is wrong with it.

        Requests of equal settings are sampled together.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, each in enumerate(requests):
            absent = (each.prompt is None, each.negative_prompt is None)
            groups[each.steps, each.guidance, absent].append(number)
        answers: dict[int, Tensor | QDeployError] = {}
        with self._lock:
            for numbers in groups.values():
                answers |= self._together([requests[number] for number in numbers], numbers)
        return [answers[number] for number in range(len(requests))]

    def _together(
        self, requests: Sequence[ImageRequest], numbers: Sequence[int]
    ) -> dict[int, Tensor | QDeployError]:
        try:
            return dict(zip(numbers, self._sample(requests), strict=True))
        except QDeployError as error:
            if len(requests) == 1:
                return {numbers[0]: error}
        answers: dict[int, Tensor | QDeployError] = {}
        for each, number in zip(requests, numbers, strict=True):
            answers |= self._together([each], [number])
        return answers

    def _sample(self, requests: Sequence[ImageRequest]) -> list[Tensor]:
        first, common = requests[0], self._sampling
        media = generate(
            self._pipeline,
            [each.seed for each in requests],
            first.steps,
            None if first.prompt is None else [str(each.prompt) for each in requests],
            first.guidance,
            height=common.height,
            width=common.width,
            negative_prompt=None
            if first.negative_prompt is None
            else [str(each.negative_prompt) for each in requests],
            **(common.arguments or {}),
        )
        if media.kind != IMAGES:
            raise InvalidInputError(f"this pipeline makes {media.kind}, and only images are served")
        if not bool(media.values.isfinite().all()):
            raise InvalidInputError("the images hold NaN or Inf: does the scheduler fit the model?")
        return list(as_stored(media).movedim(1, -1).contiguous())
