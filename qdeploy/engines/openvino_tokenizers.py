"""Tokenizers as graphs, which OpenVINO GenAI runs in place of Python's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say
from qdeploy.system.telemetry import import_silently

GRAPH = "openvino_tokenizer.xml"


def convert_tokenizers(folder: Path) -> list[str]:
    """Write ``openvino_tokenizer.xml`` into the folder of every tokenizer of a pipeline.

    Needs the package ``openvino-tokenizers``; without it the pipeline is complete for diffusers and optimum, and what
    OpenVINO GenAI lacks is said.

    Args:
        folder: the pipeline's.

    Returns:
        Names of the tokenizers that were converted.

    Raises:
        InvalidInputError: a tokenizer cannot be converted.
    """
    names = sorted(path.name for path in folder.glob("tokenizer*") if path.is_dir())
    if not names:
        return []
    if find_spec("openvino_tokenizers") is None:
        say(
            "the tokenizers are left to Python: for OpenVINO GenAI, pip install openvino-tokenizers and build again"
        )
        return []
    openvino = import_silently("openvino")
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    for name in names:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / name, local_files_only=True)
            graph = convert_tokenizer(tokenizer, with_detokenizer=False)
            openvino.save_model(graph, folder / name / GRAPH)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(f"the {name} cannot be converted for OpenVINO: {first}") from error
    return names
