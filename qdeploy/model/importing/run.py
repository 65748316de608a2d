"""``qdeploy import``: a folder that diffusers and all verbs open, from a model in another layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.model.folder import Model, open_model
from qdeploy.model.importing.latent_diffusion import latent_diffusion_pipeline
from qdeploy.model.importing.lora import Lora, fuse_lora
from qdeploy.model.importing.single_file import single_file_pipeline
from qdeploy.store.files import explained_os_errors
from qdeploy.system.errors import UsageError


def import_model(
    source: str | Path,
    output: str | Path,
    *,
    yaml: str | Path | None = None,
    config: str | Path | None = None,
    loras: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write a model as a diffusers folder, with its weights in safetensors and in float32.

    Args:
        source: a single file: a whole pipeline as Stable Diffusion is published (``*.safetensors``, ``*.ckpt``), or a
            checkpoint of latent diffusion by CompVis. With ``loras`` also whatever `open_model` opens.
        output: folder to write.
        yaml: the configuration of a latent diffusion checkpoint; by default ``config.yaml``, or the name of the file
            with ``.yaml``, in the same folder.
        config: for whole pipelines a diffusers folder of the same kind, for configurations and tokenizers; by default
            diffusers fetches them from the Hub.
        loras: files of LoRA to fuse, each with ``:SCALE`` after it where that is not 1; in this order.
        overwrite: replace a model that is at ``output``.

    Raises:
        UsageError: there is something at ``output``, or two options contradict each other.
        InvalidInputError: the file is no model, or of another architecture than its configuration says; a LoRA
            belongs to another model.
    """
    target, parsed = Path(output), [Lora.parse(text) for text in loras]
    _check_target(target, overwrite)
    with explained_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    pipeline = _opened(source, target.parent, yaml, config, bool(parsed))
    for lora in parsed:
        fuse_lora(pipeline, lora)
    return write_pipeline(pipeline, target, overwrite)


def _opened(
    source: str | Path, work: Path, yaml: str | Path | None, config: str | Path | None, fusing: bool
) -> Any:
    """The pipeline that a source holds."""
    file = Path(source)
    if not file.is_file():
        if (yaml is not None or config is not None) and file.exists():
            raise UsageError(f"--yaml and --config describe a single file, which {source} is not")
        model = open_model(source)
        if not fusing:
            raise UsageError(
                f"{source} is a diffusers folder already: import it with --lora, or use it as it is"
            )
        return model.pipeline()
    described = Path(yaml) if yaml is not None else _beside(file)
    if yaml is not None and config is not None:
        raise UsageError(
            f"--yaml is for latent diffusion, --config for a whole pipeline: give one of them for {file}"
        )
    if config is None and described is not None:
        return latent_diffusion_pipeline(file, described)
    return single_file_pipeline(file, None if config is None else Path(config), work)


def write_pipeline(pipeline: Any, target: Path, overwrite: bool) -> Model:
    """Save a pipeline to a folder that appears when it is whole.

    Raises:
        UsageError: it cannot be written.
        CapabilityError: no space is left.
    """
    with explained_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with explained_os_errors(target):
            made = work / "made"
            pipeline.save_pretrained(made, safe_serialization=True)
            open_model(made).load()  # never a folder that the next verb refuses
            if overwrite and target.exists():
                target.rename(work / "replaced")
            elif target.exists():
                target.rmdir()
            made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_model(target)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is no folder: choose another output")
    if target.is_dir() and any(target.iterdir()):
        is_model = (target / "model_index.json").is_file()
        if not (overwrite and is_model):
            raise UsageError(
                f"{target} already exists: choose another output"
                + (", or pass --overwrite to replace it" if is_model else "")
            )


def _beside(file: Path) -> Path | None:
    """The YAML of a latent diffusion checkpoint, where it lies as CompVis' archives have it."""
    names = (file.with_suffix(".yaml"), file.with_name("config.yaml"))
    return next((name for name in names if name.is_file()), None)
