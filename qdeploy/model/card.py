"""Model cards: a ``README.md`` in every quantized artifact, with the front matter that the Hub reads.

A card is part of the artifact's identity, so it holds what follows from the inputs alone: no dates, no machine,
no speed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from qdeploy.model.folder import Model
from qdeploy.model.pipeline_index import read_index
from qdeploy.store.builder import Draft
from qdeploy.store.facts import BundleFacts, CheckpointFacts, DenoiserFacts, EngineFacts
from qdeploy.store.files import write_text
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import sqnr_by_row

CARD = "README.md"
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

_WHAT = {
    "checkpoint": "a quantized checkpoint: integer weights and all scales",
    "onnx": "a quantized ONNX graph: Q/DQ around integer weights, with the numbers of the checkpoint",
    "engine": "an engine, built from a quantized ONNX graph",
}
_START = """import qdeploy
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
"""
_WHOLE = """import qdeploy

pipe = qdeploy.load_pipeline("{here}")  # a stock diffusers pipeline; needs no other model
"""
_SIMULATE = 'pipe.{component} = qdeploy.load_checkpoint("{here}")'
_USE = {
    "checkpoint": """denoiser = qdeploy.load_checkpoint("{here}")  # computes as the engines do
bundle = qdeploy.export("{here}")
engine = qdeploy.load_engine(qdeploy.build_engine(bundle))
pipe.{component} = engine.as_denoiser()""",
    "onnx": """engine = qdeploy.load_engine(qdeploy.build_engine("{here}"))
pipe.{component} = engine.as_denoiser()""",
    "engine": """engine = qdeploy.load_engine("{here}")
pipe.{component} = engine.as_denoiser()""",
}


def base_model(model: Model) -> str:
    """The Hub id that a model was downloaded by; else a name that follows from its content."""
    for part in model.path.absolute().parts:
        if found := _HUB_CACHE.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    return f"{model.class_name}-{model.sha256[:12]}"


def write_card(draft: Draft[Any], facts: DenoiserFacts) -> None:
    """Put the card of a quantized artifact into its draft; the probe and the pipeline's index lie there already.

    Args:
        draft: of a checkpoint, an ONNX bundle or an engine.
        facts: that the artifact will have.
    """
    if draft.recipe is None or facts.base_model is None:
        return  # nothing is quantized, or an earlier version did not note the model's name
    write_text(draft.content / CARD, card(draft.kind.KIND, draft.content, facts, draft.recipe))


def card(kind: str, folder: Path, facts: DenoiserFacts, recipe: Mapping[str, Any]) -> str:
    """The text of a card.

    Args:
        kind: of the artifact.
        folder: with its probe, and the pipeline's index if there is one.
        facts: of the artifact.
        recipe: the resolved one.
    """
    import yaml

    sqnr = probe_sqnr(folder)
    base, precision = str(facts.base_model), facts.precision
    title = f"{base.rpartition('/')[2]}, {precision} by {recipe['method']}"
    task = _task(folder)
    tags = ["qdeploy", "diffusers", "quantized", precision.lower(), str(recipe["method"])]
    if kind == "onnx":
        tags.append("onnx")
    if isinstance(facts, EngineFacts):
        tags.append(facts.backend)
    simulated = facts.simulated if isinstance(facts, CheckpointFacts | BundleFacts) else []
    matter: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "quantized"} if "/" in base else {}),
        "library_name": "qdeploy",
        "pipeline_tag": task,
        "tags": tags,
        "metrics": ["sqnr"],
        "model-index": [{"name": title, "results": [_result(task, sqnr)]}],
    }
    rows = {
        "denoiser": f"`{facts.class_name}`",
        "weights": facts.weights,
        "activations": facts.activations,
        "method": recipe["method"],
        "target": facts.target,
        "SQNR of the prediction, held-out probe, median": f"{sqnr:.1f} dB",
        "base model, SHA-256": f"`{facts.model_sha256}`",
    }
    if isinstance(facts, EngineFacts):
        rows["runtime"] = f"{facts.backend}, {facts.engine_precision}"
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n",
        f"# {title}\n",
        f"This is {_WHAT[kind]}, made by qdeploy from `{base}`. `qdeploy inspect` shows what is in it and "
        "whether it is intact.\n",
        *([f"It is a simulation that no engine can run: {'; '.join(simulated)}.\n"] if simulated else []),
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items()),
        "## How to use it\n",
        _use(_SIMULATE if simulated else _USE[kind], facts),
        "## Recipe\n",
        f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```\n",
        "## What was measured\n",
        "SQNR compares the prediction with that of the full-precision model, on inputs that no calibration has "
        "seen and that travel with this folder. Images, and speed on your machine: `qdeploy check`, `qdeploy "
        "benchmark`, `qdeploy report`.\n",
    ]
    return "\n".join(parts)


def probe_sqnr(folder: Path) -> float:
    """Median SQNR in dB of the simulation against full precision, to a tenth, over the probe's rows."""
    _, reference, simulated = read_probe(folder)
    return round(median(sqnr_by_row(reference if simulated is None else simulated, reference)), 1)


def _use(lines: str, facts: DenoiserFacts) -> str:
    whole = isinstance(facts, EngineFacts) and facts.pipeline is not None
    lines = _WHOLE if whole else _START + lines
    lines = lines.format(base=facts.base_model, here="this-folder", component=facts.component)
    return f"```python\n{lines.strip()}\n```\n"


def _task(folder: Path) -> str:
    index = read_index(folder)
    takes_prompts = index is not None and any(name.startswith("text_encoder") for name in index.components)
    return "text-to-image" if takes_prompts else "unconditional-image-generation"


def _result(task: str, sqnr: float) -> dict[str, Any]:
    """An entry of the Hub's ``model-index``."""
    return {
        "task": {"type": task},
        "dataset": {"type": "probe", "name": "held-out inputs of the denoiser, in this folder"},
        "metrics": [{"type": "sqnr", "value": sqnr, "name": "SQNR of the prediction, dB, median"}],
    }
