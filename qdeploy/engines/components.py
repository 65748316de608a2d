"""Text encoders and autoencoders of a pipeline as engines in the folder of the denoiser's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.engines.int8_decoder import W8A8, latents_of, quantize_decoder
from qdeploy.engines.openvino_tokenizers import convert_tokenizers
from qdeploy.engines.registry import Backend
from qdeploy.export.graph.external import plain_graph
from qdeploy.export.lower import AS_BUILT, adapt
from qdeploy.store.artifact import Artifact, Bundle, EngineFolder
from qdeploy.store.builder import Draft
from qdeploy.store.facts import PipelineFacts
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.machine import has_bf16
from qdeploy.system.progress import say

GRAPH = "model.onnx"


def plan_components(
    backend: Backend,
    source: Bundle,
    wanted: bool | None,
    precisions: Mapping[str, str] | None = None,
    strict: bool = False,
    calibration: str | Path | Artifact | None = None,
) -> PipelineFacts | None:
    """Which components of a bundle are built, and in which precision.

    Args:
        backend: builds them.
        source: the ONNX bundle.
        wanted: whether the engine is to be a whole pipeline; None for wherever bundle and backend allow it.
        precisions: by component, such as ``{"vae": "f32"}``; 16 bits by default where the machine has them.
        strict: refuse a pipeline some of whose components stay in torch.
        calibration: the set of latents for decoders at ``w8a8``.

    Returns:
        The bundle's, with the precision of each graph; None if the engine is the denoiser alone.

    Raises:
        UsageError: a precision for a component that there is not, or of an unknown name.
        CapabilityError: the backend builds no components, or ``strict`` and some stay in torch.
        InvalidInputError: the bundle is a denoiser alone.
    """
    described = source.facts.pipeline
    if wanted is False or (wanted is None and (described is None or backend.build_component is None)):
        if precisions:
            raise UsageError(
                "--components chooses precisions of a pipeline's engines, and none are built here"
            )
        return None
    if backend.build_component is None:
        raise CapabilityError(f"{backend.name} builds denoisers alone: build without --pipeline")
    if described is None:
        raise InvalidInputError(
            f"{source.path} holds a denoiser alone: export the whole pipeline, with --pipeline"
        )
    graphs, kept = described.graphs, described.torch
    if strict and kept:
        named = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise CapabilityError(f"some components of {source.path} would run in torch: {named}")
    sixteen = "bf16" if "bf16" in backend.precisions and has_bf16() else "f32"
    chosen = dict.fromkeys(graphs, sixteen)
    for name, precision in (precisions or {}).items():
        if name not in graphs:
            raise UsageError(
                f"--components {name}={precision}: the pipeline's engines are {', '.join(graphs) or 'none'}"
            )
        if precision == W8A8:
            if not any(folder.endswith("_decoder") for folder in graphs[name]):
                raise UsageError(f"--components {name}=w8a8: only decoders of autoencoders are quantized so")
            if calibration is None:
                raise UsageError(
                    f"--components {name}=w8a8 needs --calibration SET, whose latents are decoded"
                )
        elif precision not in backend.precisions or (precision == "bf16" and not has_bf16()):
            raise UsageError(
                f"--components {name}={precision}: {backend.name} computes in "
                f"{', '.join(backend.precisions)} where the processor can, and decoders in w8a8"
            )
        chosen[name] = precision
    return replace(described, precision=chosen)


def read_precisions(text: str | None) -> dict[str, str] | None:
    """Precisions by component of a text like ``vae=f32,text_encoder=bf16``.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    pairs = [part.strip().split("=") for part in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UsageError(f"--components takes NAME=PRECISION,..., such as vae=f32, not {text!r}")
    return {pair[0]: pair[1] for pair in pairs}


def build_components(
    backend: Backend,
    source: Bundle,
    draft: Draft[EngineFolder],
    plan: PipelineFacts,
    calibration: CalibrationSet | None = None,
) -> None:
    """Write the engines of a plan into the draft, and OpenVINO's tokenizers where their converter is installed.

    Raises:
        CheckFailed: a decoder at ``w8a8`` is too far from float.
        InvalidInputError: the set holds no latents of it.
    """
    assert backend.build_component is not None
    for name, folders in plan.graphs.items():
        for folder in folders:
            precision = (plan.precision or {})[name]
            graph = plain_graph(source.file(f"{folder}/{GRAPH}"), draft.work / "graphs" / folder)
            if backend.rewrites_autoencoders and folder != name:
                graph = rewritten(graph, draft.work / "rewritten" / folder)
            if precision == W8A8:
                precision = "f32"  # of weights that are in no integer layer
                if folder.endswith("_decoder") and calibration is not None:
                    latents = latents_of(calibration, source.file(f"{folder}/{GRAPH}").parent)
                    output = draft.work / "int8" / folder / GRAPH
                    draft.json(f"{folder}/w8a8.json", quantize_decoder(graph, latents, output).to_json())
                    graph = output
            say(f"building {folder} in {precision}")
            backend.build_component(graph, draft.content / folder, precision)
    if backend.name == "openvino":
        convert_tokenizers(draft.content)


def rewritten(graph: Path, folder: Path) -> Path:
    """A copy of a graph after `qdeploy.export.lower.AS_BUILT`; the graph itself where no pass fires."""
    import onnx_ir as ir

    model = ir.load(graph)
    if not adapt(model, AS_BUILT):
        return graph
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / GRAPH, external_data=f"{GRAPH}.data")
    return folder / GRAPH
