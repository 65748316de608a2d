"""The verb ``package``: an engine in, a folder that a model server loads out."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from qdeploy.engines.registry import find_backend
from qdeploy.model.pipeline_index import read_index
from qdeploy.sampling.pipeline_folder import missing_components
from qdeploy.store.artifact import Artifact, EngineFolder, open_artifact
from qdeploy.store.files import copy_file, explained_os_errors, write_json, write_text
from qdeploy.store.hub import local_artifact
from qdeploy.store.manifest import MANIFEST
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.progress import say
from qdeploy.system.suggest import unknown
from qdeploy.version import __version__
from qdeploy.workflows.packaging.layouts import LAYOUTS, PackagedEngine, denoiser_config

MARK = "package.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# The names that Triton's backends look for, by the suffix of what qdeploy's backends write.
_NATIVE = {"openvino": (".xml", ".bin"), "onnxruntime": (".onnx", ".onnx_data"), "tensorrt": (".plan",)}


@dataclass(frozen=True)
class Package:
    """What was packaged.

    Attributes:
        path: the folder.
        server: what it is for.
        name: of the model in requests.
        engine: identity of the engine in it.
    """

    path: Path
    server: str
    name: str
    engine: str

    def to_json(self) -> dict[str, str]:
        """The JSON object of ``qdeploy package --json``."""
        return {"path": str(self.path), "server": self.server, "name": self.name, "engine": self.engine}

    def as_text(self) -> str:
        """One line for people."""
        return f"{self.path} for {self.server}: {self.path / 'README.md'} has the commands"


def package(
    engine: str | Path | Artifact,
    output: str | Path,
    *,
    server: str,
    name: str | None = None,
    batch: int = 16,
    overwrite: bool = False,
) -> Package:
    """Write a folder with everything that a model server of others needs, and the commands to start it.

    Args:
        engine: that of a whole pipeline, as `build_engine` makes it, or its id on the Hub.
        output: the folder.
        server: ``triton``, ``kserve``, ``openvino-genai`` or ``ovms``.
        name: of the model in requests; that of the engine's folder by default.
        batch: most images that are sampled at once.
        overwrite: replace an earlier package at ``output``.

    Returns:
        Where it is.

    Raises:
        UsageError: an unknown server, an impossible name or number, or something else lies at ``output``.
        InvalidInputError: the engine is damaged, or holds the denoiser alone; or the server runs none of its kind.
    """
    if server not in LAYOUTS:
        raise UsageError(unknown("server", server, LAYOUTS))
    if batch < 1:
        raise UsageError(f"batch must be at least 1, not {batch}")
    artifact = open_artifact(local_artifact(engine), EngineFolder)
    missing = missing_components(artifact)
    subject = _subject(artifact, name or artifact.path.resolve().name, batch, not missing)
    layout, place = LAYOUTS[server], Path(output)
    backend = artifact.facts.backend
    if layout.backend not in (None, backend):
        raise InvalidInputError(
            f"{server} runs engines of {layout.backend}, and {artifact.path} is one of {backend}"
        )
    if missing and not (layout.denoisers and backend in _NATIVE):
        raise InvalidInputError(
            f"{artifact.path} holds no {' and no '.join(missing)}, and {server} serves whole pipelines: export with "
            "--pipeline and build it again"
        )
    if layout.backend == "openvino" and not artifact.find("tokenizer/openvino_tokenizer.xml"):
        raise InvalidInputError(
            f"{artifact.path} has no tokenizer for {server}: pip install openvino-tokenizers, and build it again"
        )
    if place.exists() and not (overwrite and (place / MARK).is_file()):
        more = "pass --overwrite" if (place / MARK).is_file() else "choose another output"
        raise UsageError(f"{place} is there already: {more}")
    if missing:
        say(f"{artifact.path} is the denoiser alone, and so is what {server} will serve")
    made = Package(place, server, subject.name, artifact.sha256)
    with explained_os_errors(place):
        _write(made, artifact, subject)
    return made


def _subject(artifact: EngineFolder, name: str, batch: int, whole: bool) -> PackagedEngine:
    if not _NAME.fullmatch(name):
        raise UsageError(f"a model's name has letters, digits, '.', '-' and '_', not {name!r}")
    index = read_index(artifact.path)
    prompts = index is not None and any(part.startswith("text_encoder") for part in index.components)
    return PackagedEngine(name, prompts, find_backend(artifact.facts.backend).device != "cpu", batch, whole)


def _write(made: Package, artifact: EngineFolder, subject: PackagedEngine) -> None:
    """Fill a hidden neighbour of the folder, and rename it into place."""
    layout, place = LAYOUTS[made.server], made.path
    work = place.with_name(f".{place.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        if subject.whole:
            engine = work / layout.engine(subject)
            for file in (*artifact.files, MANIFEST):
                copy_file(artifact.path / file, engine / file)
        for file, text in layout.files(subject).items():
            write_text(work / file, text)
        if made.server == "triton":
            _write_denoiser(work / "denoiser" / subject.name, artifact, subject)
        write_json(work / MARK, {**made.to_json(), "path": None, "qdeploy": __version__})
        if place.exists():
            shutil.rmtree(place)
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_denoiser(folder: Path, artifact: EngineFolder, subject: PackagedEngine) -> None:
    """The network alone, for the backend of Triton that runs such files; nothing where there is none."""
    backend, facts = artifact.facts.backend, artifact.facts
    component = artifact.path / facts.component
    for suffix in _NATIVE.get(backend, ()):
        for file in component.glob(f"*{suffix}"):
            # External weights of ONNX are named in the graph, so they keep their name.
            name = file.name if suffix == ".onnx_data" else f"model{suffix}"
            copy_file(file, folder / "1" / name)
    if (folder / "1").is_dir():
        write_text(folder / "config.pbtxt", denoiser_config(subject, backend))
