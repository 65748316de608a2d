"""Whole pipelines in a single file, as Stable Diffusion is published, through diffusers' own conversion."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.model.folder import COMPONENTS, read_json
from qdeploy.model.importing.checkpoint_file import read_checkpoint
from qdeploy.model.pipeline_index import INDEX, NEVER_LOADED
from qdeploy.store.files import save_tensors
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

_LORA = ("lora_unet_", "lora_te", ".lora_A.", ".lora_down.", ".lora.down.")


def single_file_pipeline(file: Path, config: Path | None, work: Path) -> Any:
    """The diffusers pipeline of a single file.

    Args:
        file: a whole pipeline, as safetensors or as a pickle of tensors.
        config: a diffusers folder of the same kind, of which configurations and tokenizers are read; by default
            diffusers fetches the ones that it knows for such files from the Hub.
        work: an existing folder on a disk with space for another copy of a pickle.

    Raises:
        InvalidInputError: the file holds no whole pipeline of that kind, or there is no configuration for it.
    """
    import diffusers
    import torch

    tensors = read_checkpoint(file)
    _check_kind(file, tensors, config)
    name = str(config) if config is not None else _default_config(tensors)
    pipeline_class = _pipeline_class(file, name, config)
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=work, prefix=".checkpoint.") as folder:
        if file.suffix != ".safetensors":  # nobody else reads the pickle
            safe = Path(folder) / "checkpoint.safetensors"
            save_tensors(tensors, safe)
            del tensors
        else:
            safe = file
        try:
            pipeline = pipeline_class.from_single_file(
                str(safe),
                config=name,
                local_files_only=config is not None,
                torch_dtype=torch.float32,
                disable_mmap=safe != file,  # a temporary file goes before its tensors do
                **_left_out(pipeline_class),
            )
        except Exception as error:  # diffusers' conversion raises whatever the first odd tensor causes
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(
                f"{file} does not hold a whole {pipeline_class.__name__} as {name} describes it: {first}"
            ) from error
    _check_complete(file, pipeline, name)
    return pipeline


def _check_kind(file: Path, tensors: dict[str, Tensor], config: Path | None) -> None:
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type

    if any(word in name for name in tensors for word in _LORA):
        raise InvalidInputError(
            f"{file} is a LoRA and no model: fuse it with `qdeploy import MODEL --lora {file}`"
        )
    named = (
        key for keys in CHECKPOINT_KEY_NAMES.values() for key in ([keys] if isinstance(keys, str) else keys)
    )
    whole = any(name.startswith("model.diffusion_model.") for name in tensors)
    if not whole and not any(key in tensors for key in named):
        raise InvalidInputError(
            f"{file} holds no model that diffusers knows: {len(tensors)} tensors, such as {sorted(tensors)[0]}"
        )
    if (
        config is None
        and infer_diffusers_model_type(tensors) == "v1"
        and CHECKPOINT_KEY_NAMES["v1"] not in tensors
    ):
        raise InvalidInputError(
            f"{file} is no pipeline that diffusers knows by its tensors: name a diffusers folder of the same kind "
            "with --config, or for a checkpoint of latent diffusion its YAML with --yaml"
        )


def _default_config(tensors: dict[str, Tensor]) -> str:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])


def _pipeline_class(file: Path, name: str, config: Path | None) -> Any:
    import diffusers

    if config is not None:
        if not (config / INDEX).is_file():
            raise InvalidInputError(f"{config} is no folder of a diffusers pipeline: it has no {INDEX}")
        kind = str(read_json(config / INDEX).get("_class_name"))
    else:
        try:
            kind = str(diffusers.DiffusionPipeline.load_config(name).get("_class_name"))
        except Exception as error:
            raise InvalidInputError(
                f"{file} needs the configuration of {name}, which cannot be had from the Hub: name a diffusers "
                "folder of the same kind with --config"
            ) from error
    found = getattr(diffusers, kind, None)
    if not hasattr(found, "from_single_file"):
        raise InvalidInputError(f"{name} is a {kind}, which diffusers cannot load from a single file")
    return found


def _left_out(pipeline_class: Any) -> dict[str, Any]:
    import inspect

    known = inspect.signature(pipeline_class.__init__).parameters
    without: dict[str, Any] = {NEVER_LOADED: None, "feature_extractor": None, "image_encoder": None}
    left = {name: value for name, value in without.items() if name in known}
    return left | ({"requires_safety_checker": False} if "requires_safety_checker" in known else {})


def _check_complete(file: Path, pipeline: Any, name: str) -> None:
    """Diffusers leaves weights that a file lacks without values."""
    import torch

    for component, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        for path, parameter in part.named_parameters():
            if parameter.is_meta:
                raise InvalidInputError(
                    f"{file} does not hold the {component} that {name} describes: {path} is missing"
                )
    if not any(getattr(pipeline, component, None) is not None for component in COMPONENTS):
        raise InvalidInputError(f"{file} holds no denoiser")
