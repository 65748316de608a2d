"""The verb ``init``: a recipe for a model, a processor and a wish, as a file to edit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qdeploy.model.folder import open_model
from qdeploy.recipe.resolve import preset_values
from qdeploy.recipe.which import PROCESSORS, WISHES, Advice, which
from qdeploy.store.files import explained_os_errors, write_text
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import has_int8
from qdeploy.system.suggest import unknown

_BACKENDS = {"tensorrt": " --backend tensorrt", "rtx": " --backend tensorrt-rtx"}
_TARGETS = {"tensorrt": "tensorrt", "rtx": "tensorrt"}


def this_processor() -> str:
    """The processor of this machine, in the words of `qdeploy.recipe.which`."""
    return "cpu" if has_int8() else "avx2"


def init(
    model: str | Path,
    output: str | Path = "recipe.yaml",
    *,
    processor: str | None = None,
    wish: str = "speed",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the recipe that the table of presets recommends.

    Args:
        model: a diffusers pipeline's folder, a shipped model's name or a Hub id.
        output: the YAML file.
        processor: where the engine is going to run: ``cpu`` (with VNNI or AMX), ``avx2`` (a CPU without),
            ``tensorrt`` or ``rtx``; this machine's CPU if None.
        wish: what matters most: ``speed``, ``size``, ``quality``, ``4-bit`` or ``8-bit``.
        overwrite: replace a file at ``output``.

    Returns:
        ``path``, ``preset``, ``why``, ``evidence`` and ``commands``: what to type next.

    Raises:
        UsageError: an unknown word, nothing fits all of them, or the file exists.
        InvalidInputError: there is no such model.
    """
    place = processor or this_processor()
    for what, word, known in (("processor", place, PROCESSORS), ("wish", wish, WISHES)):
        if word not in known:
            raise UsageError(unknown(what, word, known))
    file = Path(output)
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists: name another file with -o, or replace it with --overwrite")
    opened = open_model(model)
    kind = "transformer" if "Transformer" in opened.class_name else "unet"
    choice = which(f"{kind} {place} {wish}")[0]
    source = str(model)
    commands = _commands(source, file, place)
    head = f"# {choice.preset}, for {source} ({opened.class_name}) on {place}, {wish}: {choice.why}."
    comments = [" ".join(line.split()) for line in (head, "# Next:", *(f"#   {line}" for line in commands))]
    text = "\n".join([*comments, _yaml(choice, place)])
    with explained_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return {
        "path": str(file),
        "preset": choice.preset,
        "why": choice.why,
        "evidence": choice.evidence,
        "commands": commands,
    }


def _yaml(choice: Advice, processor: str) -> str:
    import yaml

    given = {flag.removeprefix("--"): value for flag, value in zip(choice.options[::2], choice.options[1::2])}
    target = {"target": _TARGETS[processor]} if processor in _TARGETS else {}
    return yaml.safe_dump({**preset_values(choice.preset), **target, **given}, sort_keys=False, width=100)


def _commands(source: str, file: Path, processor: str) -> list[str]:
    model, recipe = shlex.quote(source), shlex.quote(str(file))
    return [
        f"qdeploy preflight {model}",
        f"qdeploy collect {model} -o set",
        f"qdeploy calibrate {model} -o checkpoint -r {recipe} --calibration set",
        "qdeploy export checkpoint -o onnx",
        f"qdeploy build-engine onnx -o engine{_BACKENDS.get(processor, '')}",
        f"qdeploy check engine --reference {model}",
    ]
