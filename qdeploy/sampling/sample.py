"""The verb ``sample``: images of an engine, a checkpoint or a model, by its stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qdeploy.model.folder import Model
from qdeploy.model.in_memory import ModelSource, artifact_or_model
from qdeploy.model.media import IMAGES, Media
from qdeploy.model.pipeline import sample_images
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.model.prompts import PromptFile
from qdeploy.model.sampling import SAMPLING, Sampling, SamplingOptions, renamed, sampled
from qdeploy.model.timesteps import Timesteps
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.parts.folder import PartFolder, link, parts_of
from qdeploy.parts.plan import Job, named
from qdeploy.parts.run import check_place
from qdeploy.parts.verb import ArtifactInParts
from qdeploy.sampling import shards as shard_files
from qdeploy.sampling.correct import check_correction
from qdeploy.sampling.media_files import GRID, NPZ, as_stored, file_of, write_grid, write_items, write_npz
from qdeploy.sampling.source_pipeline import Source, open_pipeline, pipeline_of
from qdeploy.store.artifact import Artifact, Checkpoint, EngineFolder, Samples, is_artifact, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.data_facts import SamplesFacts
from qdeploy.store.files import save_tensors
from qdeploy.store.hub import is_on_hub, local_artifact
from qdeploy.store.joined_tensors import join_tensors, shape_of
from qdeploy.store.manifest import Notes
from qdeploy.store.measured import Measured
from qdeploy.store.paths import default_output
from qdeploy.system.devices import check_device, kind_of, own_device
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_IMAGES = 16  # where there are no prompts to count


@sampled(SAMPLING)
def sample(
    source: ModelSource | Artifact,
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    *,
    samples: int | None = None,
    model: ModelSource | None = None,
    correction: str = "none",
    npz: bool = False,
    shards: int | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
    **options: Unpack[SamplingOptions],
) -> Samples:
    """Make images. Image i has the seed ``seed + i``, in whatever batches they are made.

    Args:
        source: an engine, a checkpoint or a model, the last in a folder or in memory.
        output: folder of the images; in the working directory by default.
        sampling: how images are sampled; 50 steps of the model's own scheduler by default.
        samples: number of images; one for each prompt, or 16, by default.
        model: the pipeline in which an engine or checkpoint runs, in a folder or in memory; by default the engine's
            own where its folder is a whole pipeline, else the one that it was made from.
        correction: ``table`` or ``online`` to subtract mean errors from predictions, or ``none``; ``online:4,3``
            estimates at every fourth call, with a guard of three standard deviations.
        npz: also write ``images.npz`` with one array [N, H, W, C], as the evaluation suite of ADM reads it.
        shards: images in tar files of at most so many (or one batch), as webdataset reads them, in place of single
            files (see `qdeploy.sampling.shards`).
        overwrite: replace another artifact at ``output``.
        device: torch device of the pipeline: ``cpu``, ``cuda`` or ``cuda:N``. An engine runs where it was built for.
        on: where parts are made (see `qdeploy.parts.run.made`).
        workers: how many, on Ray.
        worker_cpus: processors for each.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        An artifact of kind ``samples``: ``00000.png`` and so on, each with its seed in a text chunk;
        ``images.safetensors`` with uint8 ``images`` ``[N, C, H, W]``; and ``grid.png``. Of videos ``00000.gif``, of
        sounds ``00000.wav``, of embeddings their tensors alone (see `qdeploy.sampling.media_files`).

    Raises:
        UsageError: an impossible number, an unknown scheduler, missing prompts, no table of corrections.
        InvalidInputError: no pipeline for the source is found, or it cannot make such images; or the
            correction does not fit checkpoint or scheduler.
        CapabilityError: the device, Ray or space on the disk is not there.
    """
    check_place(on, workers, worker_cpus)
    given: dict[str, Any] = dict(options)
    renamed(given, "count", "samples")
    samples = given.pop("samples", samples)
    chosen = (sampling or SAMPLING).changed(given)
    work = _plan(source, output, chosen, samples, model, correction, npz, overwrite, device, shards)
    return work.carry_out(on, workers, worker_cpus)


def job(**arguments: Any) -> Job:
    """The parts of a call of `sample`, by its arguments."""
    return _plan(**arguments).job


def _plan(
    source: ModelSource | Artifact,
    output: str | Path | None,
    sampling: Sampling,
    samples: int | None = None,
    model: ModelSource | None = None,
    correction: str = "none",
    npz: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    shards: int | None = None,
) -> _Work:
    """Open and check all inputs; nothing large is loaded, and nothing written."""
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    if shards is not None and shards < 1:
        raise UsageError(f"a shard holds 1 image at least, not {shards}")
    check_device(device)
    opened_by, model_by = named(source), None if model is None else named(model)
    if isinstance(source, str | Path) and not is_artifact(Path(source)) and is_on_hub(source):
        source = local_artifact(source)
    found = artifact_or_model(source)
    source_of: Source = open_artifact(found, EngineFolder, Checkpoint) if isinstance(found, Path) else None
    check_correction(correction, source_of)
    whole = pipeline_of(source_of, model) if source_of is not None else cast(Model, found)
    identity = ("model", whole.sha256) if source_of is None else (source_of.kind, source_of.sha256)
    chosen = sampling if source_of is None else sampling.sized_like(source_of.facts.sampled)
    chosen = with_shipped_prompts(chosen, whole.path)
    if samples is None:
        samples = len(chosen.prompts) if chosen.prompts else _IMAGES
    prompt_file = chosen.prompts if isinstance(chosen.prompts, PromptFile) else None
    asked: dict[str, Any] = {
        "count": samples,
        "steps": chosen.steps,
        "scheduler": chosen.scheduler,
        "prompts": None if prompt_file else chosen.prompts_json(),
        **({"prompt_file": prompt_file.to_json()} if prompt_file else {}),
        "guidance": chosen.guidance,
        "eta": chosen.eta,
        "height": chosen.height,
        "width": chosen.width,
        **({"negative_prompts": list(chosen.negative_prompts)} if chosen.negative_prompts else {}),
        **({"arguments": dict(chosen.arguments)} if chosen.arguments else {}),
        **({"timesteps": _words(chosen.timesteps)} if chosen.timesteps else {}),
        **({} if correction == "none" else {"correction": correction}),
        **({"npz": True} if npz else {}),
        **({"shards": shards} if shards else {}),
    }
    own = whole.path if source_of is None else source_of.path
    place = Path(output) if output else default_output(own, "samples")
    made_from = {identity[0]: identity[1], "pipeline": pipeline_sha256(whole)}
    if chosen.folder is not None:
        chosen.folder.check(range(samples))
        made_from["inputs"] = chosen.folder.sha256
    request = asked if kind_of(device) == "cpu" else {**asked, "device": kind_of(device)}
    arguments = {
        "source": opened_by,
        "output": named(place),
        "sampling": sampling.arguments_json(),
        "samples": samples,
        "model": model_by,
        "correction": correction,
        "npz": npz,
        "shards": shards,
        "overwrite": overwrite,
        "device": device,
    }
    draft = Draft(place, Samples, made_from, None, chosen.seed, request, overwrite, patience=-1)
    in_memory = opened_by is None or (model is not None and model_by is None)
    return _Work(
        draft, source_of, whole, chosen, identity, asked, own_device(device), None if in_memory else arguments
    )


@dataclass
class _Work(ArtifactInParts[Samples]):
    """One call of `sample`: what its parts hold, and how they become an artifact.

    Attributes:
        draft: of the artifact.
        source: what makes the images.
        whole: the model whose pipeline it is.
        sampling: how.
        identity: kind and hash of the source.
        asked: the facts that are known before.
        device: of the pipeline.
        arguments: of the call, in JSON's types; None where other processes cannot open them.
    """

    draft: Draft[Samples]
    source: Source
    whole: Model
    sampling: Sampling
    identity: tuple[str, str]
    asked: dict[str, Any]
    device: str
    arguments: dict[str, Any] | None

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, opened at its first use."""
        return open_pipeline(
            self.source, self.whole, self.sampling, self.asked.get("correction", "none"), self.device
        )

    @property
    def batches(self) -> list[range]:
        """Numbers of the images of each part."""
        return self.sampling.batches(self.asked["count"])

    @property
    def request(self) -> str:
        """Hash of what determines the parts."""
        return sha256_of([self.draft.request, self.sampling.batch])

    @property
    def place(self) -> Path:
        """The folder of the plan: batches of another size are other parts."""
        return parts_of(self.output, self.request)

    @property
    def job(self) -> Job:
        """The parts: the images of a batch as files, and as tensors."""
        return Job(
            "sample",
            self.place,
            self.request,
            len(self.batches),
            self.output,
            self.arguments,
            self.make,
            self.device,
            "sampling",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the text chunks of PNGs say."""
        correction = self.asked.get("correction")
        return {
            "steps": self.sampling.steps,
            "scheduler": type(self.pipeline.scheduler).__name__,
            self.identity[0]: self.identity[1],
            **({} if correction is None else {"correction": correction}),
        }

    def make(self, number: int, folder: Path) -> None:
        """One batch of images; pictures as uint8."""
        numbers: Sequence[int] = self.batches[number]
        media = sample_images(self.pipeline, self.sampling, numbers)
        if not bool(media.values.isfinite().all()):
            raise InvalidInputError(f"the {media.kind} hold NaN or Inf: does the scheduler fit the model?")
        stored = Media(media.kind, as_stored(media))
        if stored.kind != IMAGES and "npz" in self.asked:
            raise UsageError(f"an .npz file is of images, and these are {stored.kind}")
        save_tensors({stored.kind: stored.values}, folder / file_of(stored.kind))
        seed = self.sampling.seed
        items = write_items(folder, stored, numbers, seed, self.sampling.prompts, self.settings)
        if "shards" in self.asked:
            if not items:
                raise UsageError(f"{stored.kind} are stored as tensors alone, in no shards")
            own = self.sampling.prompts_of(numbers)
            described: list[dict[str, Any]] = [{"seed": seed + number, **self.settings} for number in numbers]
            for known, prompt in zip(described, own or (), strict=own is not None):
                known["prompt"] = prompt
            shard_files.pack(folder, items, described)

    def fill(self, parts: PartFolder) -> Samples:
        """The artifact of all parts; one batch at a time is in memory."""
        tensors, bodies, content = [], [], self.draft.content
        for files in parts.each(self.make):
            for name, file in files.items():
                if file.suffix == ".safetensors":
                    tensors.append(file)
                elif name == shard_files.BODY:
                    bodies.append(file)
                else:
                    link(file, content / name)
        kind = tensors[0].stem
        join_tensors(tensors, content / file_of(kind))
        shard_files.join(bodies, content, max(1, self.asked.get("shards", 1) // self.sampling.batch))
        write_grid(content / GRID, kind, tensors)
        if "npz" in self.asked:
            write_npz(content / NPZ, tensors)
        shape = shape_of(content / file_of(kind), kind)
        media = None if kind == IMAGES else kind
        facts = SamplesFacts(**self.asked | self.settings, shape=shape[1:], media=media)
        took = Measured(seconds=parts.seconds() + self.draft.seconds)
        return self.draft.finish(facts, took, Notes(pipeline=str(self.whole.path)))


def _words(timesteps: Timesteps) -> str:
    return timesteps if isinstance(timesteps, str) else ",".join(f"{t:g}" for t in timesteps)
