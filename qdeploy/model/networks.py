"""Classes of denoisers by name: those of diffusers, and the few of this package."""

from __future__ import annotations

from typing import Any


def find_network_class(name: str) -> Any:
    """The class of that name; None if there is none."""
    import diffusers

    from qdeploy.model import ldm_networks

    return getattr(diffusers, name, None) or {
        each.__name__: each for each in (ldm_networks.ClassUNet2DModel, ldm_networks.HeadsUNet2DModel)
    }.get(name)
