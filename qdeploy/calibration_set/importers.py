"""Calibration sets that others have published.

Q-Diffusion (arXiv 2302.04304) and papers that build on it calibrate with one ``.pt`` file: a dictionary of

    xs        [S, N, C, H, W]   noisy samples at S steps of N images
    ts        [S, N] or [S]     the t that the network was given, long or float
    cs, ucs   [S, N, L, D]      for Stable Diffusion: embeddings of the prompts and of the empty prompt

each a tensor or a list of S tensors. ``xs`` may have one entry more than ``ts``: the finished images.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.calibration_set.batch import Batch
from qdeploy.calibration_set.recorder import chosen_calls
from qdeploy.calibration_set.shards import (
    TIMESTEP_DTYPES,
    describe,
    finite,
    open_shards,
    shard_files,
    shard_name,
)
from qdeploy.model.folder import Model, open_model
from qdeploy.model.tensor_files import load_tensors
from qdeploy.store.artifact import CalibrationFolder
from qdeploy.store.builder import Draft
from qdeploy.store.manifest import Notes
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_file
from qdeploy.system.progress import track

IMAGES_PER_SHARD = 16
CONDITION = "encoder_hidden_states"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def import_qdiffusion(
    model: str | Path | Model,
    file: str | Path,
    output: str | Path,
    *,
    keep: int = 20,
    samples: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> CalibrationFolder:
    """Turn a file in Q-Diffusion's layout into a calibration set.

    With ``cs`` and ``ucs`` every (x, t) makes two rows, a conditional and an unconditional one; with ``cs``
    alone all rows are conditional.

    Args:
        model: the model that the file was made from.
        file: the ``.pt`` file. Read as tensors only: code in it is never executed.
        output: folder of the calibration set.
        keep: how many of the file's steps to take, evenly spread from the first to the last.
        samples: how many images to take, the first ones.
        seed: recorded in the set; nothing here is random.
        overwrite: replace another artifact at ``output``.

    Raises:
        UsageError: the file holds fewer steps or samples than requested.
        InvalidInputError: the file is not in this layout, holds more than tensors, or does not fit the model.
    """
    model, path = model if isinstance(model, Model) else open_model(model), Path(file)
    if keep < 1 or samples < 1:
        raise UsageError(f"keep and samples must be at least 1, not {keep} and {samples}")
    source = _read(path)
    fields = _fit(source, model)
    calls = chosen_calls(len(source.ts), keep)
    made_from = {"model": model.sha256, "file": sha256_file(path)}
    options = {"layout": "qdiffusion", "steps": keep, "samples": samples}
    draft = Draft(Path(output), CalibrationFolder, made_from, None, seed, options, overwrite)
    if done := draft.finished():
        return done
    source.check(calls, samples)
    with draft:
        starts = range(0, samples, IMAGES_PER_SHARD)
        for number, start in enumerate(track(starts, "importing")):
            images = range(start, min(start + IMAGES_PER_SHARD, samples))
            if not draft.has(shard_name(number)):
                draft.tensors(shard_name(number), partial(source.pack, calls, images, fields))
        facts = describe(
            open_shards(draft.output, shard_files(draft.content)),
            fields["xs"],
            scheduler=None,
            inference_steps=len(source.ts),
            guidance=None,
            layout="qdiffusion",
        )
        notes = Notes(source=model.source, file=str(path.absolute()))
        return draft.finish(facts, notes=notes)


@dataclass(frozen=True)
class QDiffusionFile:
    """The content of a file; each entry a tensor or a list of tensors, still on disk."""

    path: Path
    xs: Any
    ts: Any
    cs: Any = None
    ucs: Any = None

    def entries(self) -> Mapping[str, Any]:
        """What is there, by name."""
        every = {"xs": self.xs, "ts": self.ts, "cs": self.cs, "ucs": self.ucs}
        return {name: value for name, value in every.items() if value is not None}

    def check(self, calls: list[int], samples: int) -> None:
        """Look at the steps that are wanted.

        Raises:
            UsageError: there are fewer samples than wanted.
            InvalidInputError: shapes differ between steps, or there is NaN or Inf.
        """
        for name, entry in self.entries().items():
            for call in calls:
                step = entry[call]
                if name == "ts" and step.ndim == 0:
                    step = step.expand(samples)
                if step.ndim < 1 or step.shape[1:] != entry[calls[0]].shape[1:]:
                    raise InvalidInputError(f"{self.path}: the shape of {name!r} differs at step {call}")
                if len(step) < samples:
                    raise UsageError(
                        f"{self.path} holds {len(step)} samples of {name!r} at step {call}: request no more"
                    )
                if not finite(step[:samples]):
                    raise InvalidInputError(f"{self.path} holds NaN or Inf in {name!r} at step {call}")

    def pack(self, calls: list[int], images: range, fields: Mapping[str, str]) -> dict[str, Tensor]:
        """A shard of some images, with the denoiser's names for the entries in ``fields``."""
        numbers, part = torch.tensor(images), slice(images.start, images.stop)
        copies = 2 if self.ucs is not None else 1
        conditional = torch.arange(len(images) * copies) < len(images) if self.cs is not None else None
        batch = Batch(fields["xs"], numbers.repeat(copies), conditional)
        for call in calls:
            t = self.ts[call]
            inputs = {
                fields["xs"]: self.xs[call][part].float().repeat(copies, 1, 1, 1),
                "timestep": (t.expand(len(images)) if t.ndim == 0 else t[part]).repeat(copies),
            }
            if self.cs is not None:
                inputs[CONDITION] = torch.cat([c[call][part] for c in (self.cs, self.ucs)[:copies]]).float()
            batch.add(call, inputs)
        return batch.pack()


def _read(path: Path) -> QDiffusionFile:
    """Map a file into memory, as tensors and nothing else.

    Raises:
        InvalidInputError: it is not there, cannot be read, holds more than tensors, or lacks an entry.
    """
    content = load_tensors(path)
    if not isinstance(content, dict):
        found = type(content).__name__
        raise InvalidInputError(f"{path} holds a {found} instead of a dictionary of 'xs' and 'ts'")
    for name in ("xs", "ts"):
        if content.get(name) is None:
            there = ", ".join(map(repr, content)) or "nothing"
            raise InvalidInputError(f"{path} lacks {name!r}: it has {there}")
    if content.get("ucs") is not None and content.get("cs") is None:
        raise InvalidInputError(f"{path} has 'ucs' but lacks 'cs'")
    source = QDiffusionFile(path, content["xs"], content["ts"], content.get("cs"), content.get("ucs"))
    _check_entries(source)
    return source


def _check_entries(source: QDiffusionFile) -> None:
    path, entries = source.path, source.entries()
    for name, entry in entries.items():
        scalar = isinstance(entry, Tensor) and entry.ndim == 0
        tensors = list(entry) if isinstance(entry, list | tuple) else [entry]
        if scalar or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise InvalidInputError(f"{path} holds {name!r} as neither a tensor nor a list of tensors")
        if not sum(tensor.numel() for tensor in tensors):
            raise InvalidInputError(f"{path} is empty: {name!r} has no elements")
        kinds, allowed = ("int64, int32 or float", TIMESTEP_DTYPES) if name == "ts" else ("float", _FLOATS)
        for tensor in tensors:
            if tensor.dtype not in allowed:
                raise InvalidInputError(f"{path} holds {name!r} as {tensor.dtype} instead of {kinds}")
    steps = len(source.ts)
    for name, entry in entries.items():
        if len(entry) not in ((steps, steps + 1) if name == "xs" else (steps,)):
            raise InvalidInputError(f"{path} has {len(entry)} steps of {name!r}, but {steps} of 'ts'")


def _fit(source: QDiffusionFile, model: Model) -> dict[str, str]:
    """The denoiser's name for each entry.

    Raises:
        InvalidInputError: the entries do not fit the model's configuration.
    """
    config = model.config
    parameters = dict(inspect.signature(model.denoiser_class().forward).parameters)
    parameters.pop("self")
    fields = {"xs": next(iter(parameters)), "ts": "timestep"}
    if source.cs is not None:
        fields["cs"] = CONDITION
    for name, needed in fields.items():
        if needed not in parameters:
            raise InvalidInputError(f"{source.path} holds {name!r}, but {model.class_name} takes no {needed}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and name not in fields.values():
            raise InvalidInputError(f"{model.class_name} needs {name!r}, which {source.path} does not hold")
    x = source.xs[0]
    size = config.get("sample_size")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    wanted = [config.get("in_channels"), height, width]
    if x.ndim != 4 or any(n is not None and n != m for n, m in zip(wanted, x.shape[1:], strict=True)):
        takes = [n if n is not None else "any" for n in wanted]
        raise InvalidInputError(
            f"{source.path} holds samples of shape {list(x.shape[1:])}, but {model.path} takes {takes}: "
            "is it from another model?"
        )
    depth = config.get("cross_attention_dim")
    for name, c in (("cs", source.cs), ("ucs", source.ucs)):
        if c is not None and (c[0].ndim != 3 or (isinstance(depth, int) and c[0].shape[-1] != depth)):
            shape = list(c[0].shape[1:])
            raise InvalidInputError(
                f"{source.path} holds {name!r} of shape {shape}, but {model.path} takes [tokens, {depth}]"
            )
    return fields
