"""The type that products are computed in while something is learned."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from qdeploy.system.errors import CapabilityError

PRECISIONS = ("float32", "bfloat16")


def products_in(precision: str | None, device: str) -> AbstractContextManager[None]:
    """Within, matrix products and convolutions are computed in a type, sums and everything else in float32.

    Args:
        precision: one of `PRECISIONS`; None is float32.
        device: where they are computed.

    Raises:
        CapabilityError: torch cannot do so on that device.
    """
    kind, lower = torch.device(device).type, precision == "bfloat16"
    known = torch.amp.is_autocast_available(kind)
    if lower and not known:
        raise CapabilityError(f"torch has no autocast on {device}: leave out the precision of round-weights")
    if not lower and not (known and torch.is_autocast_enabled(kind)):
        return nullcontext()
    # Without the cache, which would keep what a parameter was before a step.
    return torch.autocast(kind, torch.bfloat16, enabled=lower, cache_enabled=False)
