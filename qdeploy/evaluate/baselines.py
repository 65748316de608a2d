"""The full-precision and 16-bit engines that every speed is compared with."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qdeploy.engines.build import build_engine
from qdeploy.engines.registry import find_backend
from qdeploy.export.run import export
from qdeploy.model.folder import Model
from qdeploy.model.origin import source_model
from qdeploy.store.artifact import Artifact, Bundle, DenoiserArtifact, EngineFolder, open_artifact
from qdeploy.store.paths import cache_entry
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_of
from qdeploy.system.machine import has_bf16
from qdeploy.system.progress import say
from qdeploy.version import __version__

_A = TypeVar("_A", bound=Artifact)

FULL, HALF = "f32", "bf16"
HALVES = {"cpu": HALF, "cuda": "f16"}
# Facts of an engine that its baselines share where kernels are chosen for sizes, as on GPUs.
_ALIKE = ("batch", "shapes", "optimization_level", "workspace")


def _kept(place: Path, kind: type[_A]) -> _A | None:
    """The entry of the cache, if it was made before and is whole."""
    if not place.exists():
        return None
    try:
        return open_artifact(place, kind)
    except InvalidInputError as error:
        say(f"{error}: it is made again")
        shutil.rmtree(place)
        return None


def is_baseline(engine: DenoiserArtifact) -> bool:
    """Whether an engine is itself a full-precision or 16-bit one: nothing in it is quantized."""
    return engine.facts.weights == "none"


def baseline_precisions(backend: str) -> list[str]:
    """The precisions of a backend's baselines on this machine: f32, and 16 bits where it has them."""
    found = find_backend(backend)
    half = HALVES[found.device]
    wanted = (FULL, half) if half != HALF or has_bf16() else (FULL,)
    return [precision for precision in wanted if precision in found.precisions]


def _entry(model: Model, name: str) -> AbstractContextManager[Path]:
    return cache_entry("reference", model.sha256[:32], name)


def baseline_bundle(model: Model, like: DenoiserArtifact | None = None) -> Bundle:
    """A full-precision model as ONNX, exported at its first use and kept in the cache.

    Args:
        model: the model.
        like: an artifact of the model that takes the same inputs, in the same shapes.

    Raises:
        InvalidInputError: the model cannot be exported.
        UsageError: the cache belongs to another user.
    """
    name = f"onnx-{__version__}" + ("" if like is None else f"-{inputs_key(like)}")
    with _entry(model, name) as place:
        # The probe of the artifact that was compared first serves all others of its shapes.
        return _kept(place, Bundle) or export(model.source, place, calibration=like)


def inputs_key(artifact: DenoiserArtifact) -> str:
    """What tells artifacts of one model apart by the inputs that they take: names, shapes and constants."""
    inputs = artifact.probe().inputs
    shapes = {n: [str(x.dtype), *x.shape[1:]] for n, x in sorted(inputs.items()) if n != "timestep"}
    call = artifact.facts.call
    return sha256_of([shapes, None if call is None else call.to_json()])[:8]


def baseline_engine(
    model: Model, backend: str, precision: str, like: EngineFolder | None = None
) -> EngineFolder:
    """The engine of a full-precision model, built at its first use and kept in the cache.

    Args:
        model: the model.
        backend: name of the backend.
        precision: what it computes in.
        like: the engine that it will be compared with: its inputs are taken, and its sizes where backends tune for
            them.

    Raises:
        InvalidInputError: the model cannot be exported.
        UsageError: the cache belongs to another user.
    """
    found = find_backend(backend)
    alike: dict[str, Any] = {}
    if found.device != "cpu":
        shared = {name: getattr(like.facts, name) for name in _ALIKE if like is not None}
        alike = {name: value for name, value in shared.items() if value is not None}
    name = f"{backend}-{found.version().split('-')[0]}-{precision}-{__version__}"
    name += f"-{sha256_of(alike)[:8]}" if alike else ""
    name += f"-{inputs_key(like)}" if like else ""
    bundle = baseline_bundle(model, like)
    with _entry(model, name) as place:
        return _kept(place, EngineFolder) or build_engine(
            bundle, place, backend=backend, precision=precision, allow_inaccurate=True, **alike
        )


@dataclass(frozen=True)
class Entrant:
    """An engine that takes part in a benchmark.

    Attributes:
        name: its name in ratios.
        artifact: its folder.
        rivals: names of the baselines of the same model and backend, by precision.
    """

    name: str
    artifact: EngineFolder
    rivals: Mapping[str, str]

    @property
    def precision(self) -> str:
        """Its precision, such as ``W8A8``; for a baseline the type that it computes in."""
        facts = self.artifact.facts
        return facts.engine_precision if is_baseline(self.artifact) else facts.precision


def enter(artifacts: Sequence[EngineFolder], reference: str | Path | Model | None) -> list[Entrant]:
    """The engines under unique names, preceded by the baselines of each model and backend."""
    artifacts = list({artifact.path.resolve(): artifact for artifact in artifacts}.values())
    names = _distinct_names(artifacts)
    groups: dict[tuple[str, str, str], list[EngineFolder]] = defaultdict(list)
    for artifact in artifacts:
        facts = artifact.facts
        groups[facts.model_sha256, facts.backend, inputs_key(artifact)].append(artifact)
    baselines: list[Entrant] = []
    entered: list[Entrant] = []
    for group, members in groups.items():
        backend = group[1]
        rivals: dict[str, str] = {}
        for precision in baseline_precisions(backend):
            own = [a for a in members if is_baseline(a) and a.facts.engine_precision == precision]
            if own:
                rivals[precision] = names[own[0].path]
                continue
            say(f"the {precision} engine to compare with, on {backend}", level=2)
            model = source_model(members[0], reference)
            built = baseline_engine(model, backend, precision, members[0])
            rivals[precision] = name = _baseline_name(precision, *group, groups)
            baselines.append(Entrant(name, built, {}))
        entered += [
            Entrant(name, a, {kind: rival for kind, rival in rivals.items() if rival != name})
            for a in members
            for name in [names[a.path]]
        ]
    return baselines + entered


def _baseline_name(
    precision: str, model: str, backend: str, inputs: str, groups: Collection[tuple[str, str, str]]
) -> str:
    """The precision, with as much more as tells baselines of several models, backends and sizes apart."""
    models, backends = ({group[index] for group in groups} for index in (0, 1))
    sizes = {group[2] for group in groups if group[0] == model}
    more = ((backend, backends), (model[:8], models), (inputs, sizes))
    return " ".join([precision, *(name for name, every in more if len(every) > 1)])


def _distinct_names(artifacts: Sequence[EngineFolder]) -> dict[Path, str]:
    """The folders' names, or their whole paths where two names are equal."""
    names = [artifact.path.resolve().name for artifact in artifacts]
    taken = [*names, FULL, *HALVES.values()]
    return {
        artifact.path: name if taken.count(name) == 1 else str(artifact.path.resolve())
        for artifact, name in zip(artifacts, names, strict=True)
    }
