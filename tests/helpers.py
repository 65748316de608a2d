"""Helpers that many tests share: calibration rows in memory, sessions, measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.calibrate.record_units import UnitRun
from qdeploy.calibrate.recorded_rows import RecordedRows
from qdeploy.calibrate.session import Session
from qdeploy.model.inputs import denoise
from qdeploy.network.roles import find_structure
from qdeploy.quant.insert import quantize_structure
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.quant.state import read_state
from qdeploy.recipe import effort as efforts
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.formats import Format
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.artifact import Artifact, Bundle, CalibrationFolder, Checkpoint, EngineFolder
from qdeploy.store.builder import Draft
from qdeploy.store.data_facts import CalibrationSetFacts, InputFacts
from qdeploy.store.facts import BundleFacts, CheckpointFacts, EngineFacts, Facts
from qdeploy.store.manifest import IDENTITY, MANIFEST
from qdeploy.system import machine
from qdeploy.system.hashing import sha256_file, sha256_of
from tests.models.networks import tiny_unet as tiny_unet

TINY = Effort("tiny", rows=26, batch=12, rounding=8, scales=4, tuning=4)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise, in dB."""
    noise = (reference - other).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def relative(reference: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the reference's."""
    return float((reference - other).norm() / reference.norm())


def codes_of(denoiser: nn.Module) -> dict[tuple[str, int], Tensor]:
    """Codes of all weights by layer and part; `freeze` lets go of them."""
    return {
        (path, part): quantizer.codes
        for path, layer in quantized_layers(denoiser).items()
        for part, quantizer in enumerate(layer.weight_quantizers)
        if quantizer.codes is not None
    }


def pretend_processor(
    monkeypatch: pytest.MonkeyPatch, folder: Path, flags: str, name: str = "Testor"
) -> None:
    """Let this machine say that its processor has that name and these instruction sets only."""
    file = folder / "cpuinfo"
    file.write_text(f"model name\t: {name}\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(machine, "CPUINFO", file)


def plain_options() -> Any:
    """ONNX Runtime's options for computing a graph as it is written, on one thread."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen.intra_op_num_threads = 1
    return chosen


# -- networks and rows -------------------------------------------------------------------------------------


class MemoryRows:
    """What a session needs of a calibration set, in memory: noisy images, image after image."""

    sha256 = "0" * 64

    def __init__(self, tensors: dict[str, Tensor], images: Tensor) -> None:
        self.tensors, self.images = tensors, images
        self.timesteps = tensors["timestep"]

    @classmethod
    def noisy(cls, images: int = 16, steps: int = 4, channels: int = 3, size: int = 8) -> MemoryRows:
        """Smooth images with noise that grows with t, as a sampler meets them."""
        generator = torch.Generator().manual_seed(7)
        clean = torch.randn(images, channels, 2, 2, generator=generator)
        clean = nn.functional.interpolate(clean, size=size, mode="bilinear").repeat_interleave(steps, 0)
        timesteps = torch.linspace(999, 1, steps).round().long().repeat(images)
        share = (timesteps / 1000).view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        sample = (1 - share).sqrt() * clean + share.sqrt() * noise
        return cls({"sample": sample, "timestep": timesteps}, torch.arange(images).repeat_interleave(steps))

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, rows: Sequence[int] | Tensor, device: str = "cpu") -> dict[str, Tensor]:
        chosen = torch.as_tensor(rows)
        return {name: tensor[chosen].to(device) for name, tensor in self.tensors.items()}

    def check_fits(self, model: Any, denoiser: nn.Module) -> None:
        denoise(denoiser, self.inputs([0]))


# -- calibrations ------------------------------------------------------------------------------------------


def dit_rows(data: MemoryRows) -> MemoryRows:
    """The same rows with class labels, named as the inputs of `tests.models.tiny_dit`."""
    classes = torch.arange(len(data)) % 10
    tensors = {"hidden_states": data.tensors["sample"], "timestep": data.timesteps, "class_labels": classes}
    return MemoryRows(tensors, data.images)


class Stopped(BaseException):
    """An interruption that no ``except Exception`` catches, as a signal."""


def same_state(first: Session, second: Session) -> bool:
    """Whether two sessions hold the same codes and scales, bit for bit."""
    one, two = read_state(first.denoiser), read_state(second.denoiser)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same_tree(first: Any, second: Any) -> bool:
    """Whether two calls or outputs hold the same tensors, bit for bit, and else the same objects."""
    leaves = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b for a, b in leaves)


@contextmanager
def calibrating(
    denoiser: nn.Module,
    data: Any,
    output: Path,
    effort: Effort = TINY,
    max_memory: int = 2**30,
    **recipe: Any,
) -> Iterator[Session]:
    """A session whose draft is open; ``recipe`` holds fields of a recipe."""
    known = dict(efforts.EFFORTS)
    efforts.EFFORTS[effort.name] = effort
    try:
        resolved = resolve_recipe(effort=effort.name, **recipe)
        structure = find_structure(denoiser, data.inputs([0]))
        layers = quantize_structure(denoiser, structure, resolved)
        denoiser.eval().requires_grad_(False)
        made_from = {"model": "1" * 64, "calibration": data.sha256}
        draft = Draft(output, Checkpoint, made_from, resolved.to_json(), resolved.seed)
        with draft:
            yield Session(denoiser, structure, layers, data, resolved, draft, max_memory=max_memory)
    finally:
        efforts.EFFORTS.clear()
        efforts.EFFORTS.update(known)


def layer_problem(layer: QuantizedLayer, x: Tensor, y: Tensor, learn: int) -> UnitProblem:
    """The reconstruction problem of one layer: ``learn`` rows to learn from, the others to judge by."""
    inputs = RecordedRows([x], [1], lambda tensors: ((tensors[0],), {}))
    targets = RecordedRows([y], [1], lambda tensors: tensors[0])
    rows = torch.arange(len(x))
    return UnitProblem(UnitRun(layer, inputs), targets, rows[:learn], rows[learn:])


def bare_session(batch: int = 16, seed: int = 0) -> Any:
    """As much of a session as the work on one unit asks for."""

    def generator(*names: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return SimpleNamespace(generator=generator, effort=SimpleNamespace(batch=batch))


def minmax_layer(
    inner: nn.Module, x: Tensor, weights: Format, activations: Format | None, split: tuple[int, ...] = ()
) -> QuantizedLayer:
    """A layer quantized with min-max ranges of its weight and of ``x``."""
    layer = QuantizedLayer(inner, weights, activations, split).requires_grad_(False)
    for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
        quantizer.set(*minmax_weights(weight, quantizer.format))  # type: ignore[arg-type, operator]
    if activations:
        for quantizer, part in zip(layer.input_quantizers, layer.input_parts(x), strict=True):
            quantizer.set(*to_scale(part.min(), part.max(), activations))  # type: ignore[operator]
    return layer


# -- artifacts ---------------------------------------------------------------------------------------------

REQUEST: dict[str, Any] = {
    "kind": Checkpoint,
    "made_from": {"model": "a" * 64},
    "recipe": {"method": "minmax", "seed": 3},
    "seed": 3,
}


def some_facts(kind: type[Artifact] = Checkpoint, **changes: Any) -> Facts:
    """Facts of an artifact of that kind, with some of them changed."""
    denoiser = {
        "component": "unet",
        "class_name": "UNet2DModel",
        "model_sha256": "0" * 64,
        "precision": "W8A8",
        "weights": "int8",
        "activations": "int8",
        "target": "portable",
    }
    if kind is Checkpoint:
        return CheckpointFacts(**{**denoiser, "simulated": [], "layers": 4, **changes})
    if kind is Bundle:
        return BundleFacts(**{**denoiser, "simulated": [], **changes})
    if kind is EngineFolder:
        built = {"backend": "openvino", "backend_version": "1", "engine_precision": "f32"}
        return EngineFacts(**{**denoiser, **built, "batch": 1, "threads": None, **changes})
    if kind is CalibrationFolder:
        rows: dict[str, Any] = {"rows": 1, "images": 1, "steps": 1, "inference_steps": 1, "timesteps": [0]}
        inputs = [InputFacts(name="sample", dtype="float32", shape=[1], shared=False)]
        unknown = dict.fromkeys(("pairs", "scheduler", "guidance"))
        return CalibrationSetFacts(**{"sample": "sample", "inputs": inputs, **rows, **unknown, **changes})
    raise NotImplementedError(kind)


def small_draft(output: Path, **changes: Any) -> Draft[Any]:
    """A request, with some of it changed."""
    return Draft(output, **{**REQUEST, **changes})


def small_artifact(output: Path, content: float = 1.0, **changes: Any) -> Artifact:
    """A small artifact, with a file in a folder and one beside it."""
    facts = changes.pop("facts", None) or some_facts(changes.get("kind", Checkpoint))
    measured, notes = changes.pop("measured", None), changes.pop("notes", None)
    with small_draft(output, **changes) as work:
        work.tensors("part/weights.safetensors", lambda: {"x": torch.full((3,), content)})
        work.json("config.json", {"size": 8})
        return work.finish(facts, measured, notes)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change a manifest, and recompute its hashes and those of the files that it lists: anybody can."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {
        name: sha256_file(folder / name) if (folder / name).is_file() else digest
        for name, digest in manifest["files"].items()
    }
    change(manifest)
    manifest["sha256"] = sha256_of({key: manifest.get(key) for key in IDENTITY})
    manifest["integrity"] = sha256_of({key: item for key, item in manifest.items() if key != "integrity"})
    (folder / MANIFEST).write_text(json.dumps(manifest))


def files_in(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
