"""The denoiser of a diffusers model: found in a folder, checked, loaded, called.

Everything here goes by what a model says of itself (``model_index.json``, ``config.json``, the signature
of its ``forward``), so that U-Nets and transformers are the same to the rest of the package.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.model.call import time_parameter
from qdeploy.model.download import download
from qdeploy.model.fill import fill, without_parameters
from qdeploy.model.networks import find_network_class
from qdeploy.model.pipeline_index import INDEX, NEVER_LOADED, PipelineIndex, read_index
from qdeploy.model.requirements import require_libraries
from qdeploy.model.weights import WeightFiles, find_weights, variants_needed
from qdeploy.model.zoo import find_zoo_model
from qdeploy.store.bounded_json import read_json_object
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_files
from qdeploy.system.machine import check_device
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from torch import nn

COMPONENTS = ("unet", "transformer", "prior", "decoder")
MOST_TIMESTEPS = 1_000_000  # of training; models have 1,000


@dataclass(frozen=True)
class Model:
    """A diffusers model on disk.

    Attributes:
        path: the pipeline's folder, or the denoiser's own.
        component: name of the denoiser's folder within ``path``; empty if ``path`` is that folder.
        variant: the variant of its weight files to load, such as ``fp16``; None for the plain ones, or the only
            ones there are.
    """

    path: Path
    component: str
    variant: str | None = None

    @property
    def source(self) -> str:
        """What `open_model` opens this very model by."""
        return str(self.path.absolute()) + (f"@{self.variant}" if self.variant else "")

    @property
    def folder(self) -> Path:
        """The denoiser's folder."""
        return self.path / self.component if self.component else self.path

    @property
    def name(self) -> str:
        """The component's name in a pipeline, ``unet`` or ``transformer``."""
        return self.component or ("unet" if "UNet" in self.class_name else "transformer")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The denoiser's ``config.json``."""
        return read_json(self.folder / "config.json")

    @property
    def class_name(self) -> str:
        """The denoiser's diffusers class."""
        return str(self.config.get("_class_name"))

    @property
    def has_pipeline(self) -> bool:
        """Whether the folder holds a whole pipeline."""
        return (self.path / INDEX).is_file()

    @property
    def training_timesteps(self) -> int | None:
        """How many timesteps the model was trained with; None if its pipeline has no scheduler."""
        steps = self.scheduler_config.get("num_train_timesteps")
        return steps if isinstance(steps, int) else None

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of the pipeline's scheduler; empty if there is none.

        Raises:
            InvalidInputError: it is for more timesteps than any model is trained with; a scheduler makes tables of
                that length.
        """
        file = self.path / "scheduler" / "scheduler_config.json"
        config = read_json(file) if file.is_file() else {}
        steps = config.get("num_train_timesteps", 1)
        if not isinstance(steps, int) or not 1 <= steps <= MOST_TIMESTEPS:
            raise InvalidInputError(
                f"{file}: num_train_timesteps is a whole number from 1 to {MOST_TIMESTEPS}, not {steps!r:.60}"
            )
        return config

    def scheduler(self) -> Any:
        """The pipeline's scheduler.

        Raises:
            InvalidInputError: there is none, or diffusers cannot read it.
        """
        import diffusers

        config = self.scheduler_config
        if not config:
            raise InvalidInputError(f"{self.path} has no scheduler")
        found = getattr(diffusers, str(config.get("_class_name")), None)
        if found is None:
            raise InvalidInputError(
                f"{self.path} has a scheduler {config.get('_class_name')}, unknown to diffusers"
            )
        return found.from_config(config)

    @cached_property
    def sha256(self) -> str:
        """Identity of the denoiser: its configuration and weights."""
        return sha256_files({file.name: file for file in [self.folder / "config.json", *self.weights]})

    @cached_property
    def weight_files(self) -> WeightFiles:
        """The denoiser's weight files, as diffusers chooses them.

        Raises:
            InvalidInputError: there are none, or it does not say which.
        """
        return find_weights(self.folder, self.variant)

    @property
    def weights(self) -> list[Path]:
        """The safetensors files that the denoiser is loaded from.

        Raises:
            InvalidInputError: there are none, or it does not say which.
        """
        return list(self.weight_files.files)

    def build(self) -> nn.Module:
        """The denoiser with its configuration, its parameters without values or memory (device ``meta``).

        Raises:
            InvalidInputError: its class does not take the configuration.
        """
        kind = self.denoiser_class()
        try:
            with without_parameters():
                denoiser: nn.Module = kind.from_config(self.config)
        except Exception as error:  # whatever a class of diffusers makes of values that it does not expect
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(
                f"{self.folder} describes no {self.class_name} that diffusers can make: {reason}"
            ) from error
        return denoiser.eval()

    def load(self, device: str = "cpu", streamed: bool = False) -> nn.Module:
        """The denoiser in float32 and evaluation mode, its weights verified.

        Weights are read one tensor after the other. On a CPU those that are stored in float32 stay in their file,
        mapped into memory: it takes what the network touches, and the system can take it back.

        Args:
            device: where to.
            streamed: let layers read their weights from the files at each call, on a CPU (see
                `qdeploy.model.unloaded`).

        Raises:
            InvalidInputError: weights are truncated, do not fit the class, or hold NaN or Inf.
            UsageError, CapabilityError: there is no such device.
        """
        check_device(device)
        if unread := self.weight_files.unread:
            say(f"not read: {', '.join(file.name for file in unread)} in {self.folder}")
        denoiser = self.build().float()
        if streamed:
            from qdeploy.model.unloaded import fill_but_weights

            fill_but_weights(denoiser, self.weights, self.folder)
            return denoiser.requires_grad_(False)
        fill(denoiser, self.weights, self.folder)
        return denoiser.to(device).requires_grad_(False)

    def pipeline(self, denoiser: nn.Module | None = None) -> Any:
        """The stock diffusers pipeline in float32, with ``denoiser`` in the denoiser's place.

        Raises:
            InvalidInputError: the folder holds no pipeline that diffusers can load.
        """
        import diffusers
        import torch

        if not self.has_pipeline:
            raise InvalidInputError(
                f"{self.path} holds a denoiser alone; sampling needs the whole pipeline's folder, with {INDEX}"
            )
        index = read_index(self.path)
        assert index is not None
        require_libraries(index)
        _ = self.scheduler_config  # refused before diffusers makes its tables
        diffusers.utils.logging.disable_progress_bar()
        parts: dict[str, Any] = {self.component: denoiser if denoiser is not None else self.load()}
        if NEVER_LOADED in index.components:
            parts[NEVER_LOADED] = None
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                self.path,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                variant=self._pipeline_variant(),
                **parts,
            )
        except Exception as error:  # of diffusers, transformers, tokenizers and safetensors: no common base
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InvalidInputError(f"diffusers cannot load the pipeline in {self.path}: {first}") from error
        # Some pipelines, such as Wan's, load a denoiser of their own although they are given one.
        setattr(pipeline, self.component, parts[self.component])
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name != self.component:
                part.float()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _pipeline_variant(self) -> str | None:
        """The variant to ask diffusers for, where components have no plain weights.

        Raises:
            InvalidInputError: components need several.
        """
        index = read_index(self.path)
        names = [] if index is None else list(index.others(self.component))
        needed = variants_needed(self.path, names, self.variant)
        if self.variant in needed:
            return self.variant
        if len(needed) > 1:
            raise InvalidInputError(
                f"the components of {self.path} have their weights in the variants {', '.join(sorted(needed))}: save "
                "the pipeline in one"
            )
        return next(iter(needed), None)

    def denoiser_class(self) -> Any:
        """The diffusers class that the configuration names.

        Raises:
            InvalidInputError: it is no denoiser.
        """
        found = find_network_class(self.class_name)
        if found is None or time_parameter(inspect.signature(found.forward).parameters) is None:
            raise InvalidInputError(
                f"{self.folder} holds a {self.class_name}, which is no denoiser: diffusers has no such class "
                "with a timestep among its inputs"
            )
        return found


def open_model(source: str | Path) -> Model:
    """Find the denoiser of a diffusers folder, a zoo model's name or a Hub id.

    Args:
        source: one of these; ``@VARIANT`` after it chooses among the variants of its weight files.

    Raises:
        InvalidInputError: there is no diffusers model at ``source``.
    """
    path, variant = Path(source), None
    if not path.exists():
        name, _, variant = str(source).partition("@")
        path = Path(name) if Path(name).exists() else find_zoo_model(name) or download(name, variant or None)
    if not path.is_dir():
        raise InvalidInputError(
            f"{path} is not a diffusers folder: it is a file; if it holds a whole model, make a folder of it with "
            f"`qdeploy import {path} -o FOLDER`"
        )
    if (index := read_index(path)) is not None:
        for component in COMPONENTS:
            if component in index.components and (path / component / "config.json").is_file():
                return Model(path, component, variant or None)
        raise InvalidInputError(_no_denoiser(path, index))
    if (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json"):
        return Model(path, "", variant or None)
    raise InvalidInputError(
        f"{path} is not a diffusers folder: it has neither {INDEX} nor a model's config.json"
    )


def _no_denoiser(path: Path, index: PipelineIndex) -> str:
    for component in COMPONENTS:
        if component in index.components:
            return (
                f"{path} is incomplete: {INDEX} names the component {component}, and there is no "
                f"{component}/config.json"
            )
    return f"{path} is a diffusers pipeline without a denoiser ({' or '.join(COMPONENTS)})"


def open_if_there(source: str | None) -> Model | None:
    """The model that an artifact notes as its source; None if it is not there any more."""
    if source is None or not (Path(source).exists() or Path(source.partition("@")[0]).exists()):
        return None
    return open_model(source)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model. Schedulers' configurations may hold infinities.

    Raises:
        InvalidInputError: there is none.
    """
    return read_json_object(path, infinities=True)
