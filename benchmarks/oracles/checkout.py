"""Their package out of a checkout, without what it needs for other models and for GPUs.

The code of Q-Diffusion, and of those that build on it, imports the networks of latent diffusion and of DDIM to know
their blocks by type, and moves every batch to ``cuda``. Neither matters for a network of diffusers on a CPU: modules
that cannot be imported are stood in for by classes that no network is made of, and ``cuda`` is where the network is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FOREIGN = ("ldm", "ddim", "einops", "taming", "pytorch_lightning", "omegaconf")
MODULES = ("quant_layer", "quant_block", "quant_model", "block_recon", "layer_recon")


class _StandIn(ModuleType):
    """A module any name of which is a class that nothing is an instance of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (nn.Module,), {})
        setattr(self, name, made)
        return made


class _StandIns(MetaPathFinder, Loader):
    """Finds modules of `FOREIGN` packages, whether or not they are installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = fullname.partition(".")[0] in FOREIGN
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def reference(checkout: Path, package: str = "qdiff") -> Iterator[SimpleNamespace]:
    """Their modules, by the names in `MODULES`, while the context lasts.

    Args:
        checkout: folder of the repository.
        package: their package's folder in it.

    Raises:
        FileNotFoundError: there is no such package.
    """
    if not (checkout / package / "quant_layer.py").is_file():
        raise FileNotFoundError(
            f"{checkout} holds no {package}/quant_layer.py: it is no checkout of that kind"
        )
    before, finder, stock = set(sys.modules), _StandIns(), Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = ["cpu" if str(place).startswith("cuda") else place for place in args]
        return stock(tensor, *places, **kwargs)

    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(checkout))
    if not torch.cuda.is_available():
        Tensor.to = to  # type: ignore[method-assign, assignment]
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"{package}.{name}") for name in MODULES})
    finally:
        Tensor.to = stock  # type: ignore[method-assign]
        sys.path.remove(str(checkout))
        sys.meta_path.remove(finder)
        roots = (package, *FOREIGN)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in roots:
                del sys.modules[name]
