"""Methods of diffusers' models that change how a network computes, which an engine cannot follow.

Pipelines call these on their denoiser: ``pipe.load_lora_weights`` calls ``unet.load_lora_adapter``. On an engine each
answers in a sentence that says what to do instead. What only undoes such a change has nothing to undo, and passes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdeploy.system.errors import CapabilityError

# They undo what an engine never did.
_UNDOING = ("disable_", "unfuse_", "unload_", "set_default_attn_processor")
# Savers of memory that pipelines offer to every component that has them, and skip where it has not.
_SKIPPED = ("set_attention_slice", "enable_gradient_checkpointing")
_ADAPTERS = ("lora", "adapter", "attn_procs")


def refusal(original: type, name: str, path: Path) -> Callable[..., Any] | None:
    """What stands in for a method of the original class that an engine lacks.

    Args:
        original: the diffusers class that the engine was made from.
        name: of the attribute.
        path: the engine's folder, for the message.

    Returns:
        A function that raises `CapabilityError`, or does nothing where there is nothing to undo; None if the class
        has no such method, or pipelines do without it.
    """
    if name.startswith("_") or name in _SKIPPED or not callable(getattr(original, name, None)):
        return None
    if name.startswith(_UNDOING):
        return lambda *args, **kwargs: None

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise CapabilityError(f"the engine {path} cannot {_instead(name)}")

    return refuse


def _instead(name: str) -> str:
    if any(word in name for word in _ADAPTERS):
        return (
            f"do {name}: its weights are integers in a finished graph; fuse the LoRA into the model first "
            "(pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights, pipe.save_pretrained), and calibrate "
            "and build that model"
        )
    if "freeu" in name:
        return f"do {name}: FreeU rescales features inside the network, and the graph is finished without it"
    return f"do {name}: its graph is finished, and its runtime chooses how it is computed; use the original model"
