"""``import``: models in other layouts."""

from __future__ import annotations

import time
from typing import Any

import click

from qdeploy.commands.base import print_result, verb
from qdeploy.commands.options import Verb

_IMPORT = Verb("qdeploy.model.importing.run", "import_model")


@click.command("import")
@click.argument("source")
@_IMPORT.option("output", "Folder to write.", required=True)
@_IMPORT.option("yaml", "Of a latent diffusion checkpoint.  [default: the one in its folder]")
@_IMPORT.option("config", "Folder of the same kind, for configurations.  [default: from the Hub]")
@_IMPORT.option("loras", "LoRA to fuse, FILE or FILE:SCALE.", "--lora", metavar="FILE[:SCALE]")
@_IMPORT.option("overwrite", "Replace another model at the output.")
@verb
def import_(source: str, output: str, as_json: bool, **options: Any) -> None:
    """Write a single file, a latent diffusion checkpoint, or a model with LoRA, as a diffusers folder."""
    began = time.perf_counter()
    model = _IMPORT.call(source, output, **options)
    summary = {
        "path": str(model.path),
        "kind": "model",
        "sha256": model.sha256,
        "seconds": round(time.perf_counter() - began, 3),
    }
    text = f"model {model.path} ({model.sha256[:12]}) in {summary['seconds']:.1f} s"
    print_result(as_json, lambda: summary, lambda: text)
