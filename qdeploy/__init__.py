"""qdeploy: from a diffusion model to a measured low-bit engine.

    import qdeploy

    data = qdeploy.collect("model/", "set/")
    checkpoint = qdeploy.calibrate("model/", "w4a8/", recipe="w4a8-qdiffusion-steady", calibration=data)
    engine = qdeploy.build_engine(qdeploy.export(checkpoint))
    pipe.unet = qdeploy.load_engine(engine).as_denoiser()

Nothing heavy is imported before one of these is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qdeploy.version import __version__

if TYPE_CHECKING:
    from qdeploy.calibration_set.collect import collect
    from qdeploy.engines.build import build_engine, load_engine
    from qdeploy.evaluate.benchmark import benchmark
    from qdeploy.evaluate.check import check
    from qdeploy.evaluate.report_page.run import report
    from qdeploy.export.run import export
    from qdeploy.mixed.sensitivity import sensitivity
    from qdeploy.quant.checkpoint import load_checkpoint
    from qdeploy.sampling.sample import sample
    from qdeploy.workflows.calibrate import calibrate
    from qdeploy.workflows.demo import demo

__all__ = [
    "__version__",
    "benchmark",
    "build_engine",
    "calibrate",
    "check",
    "collect",
    "demo",
    "export",
    "load_checkpoint",
    "load_engine",
    "report",
    "sample",
    "sensitivity",
]

# Where each public name is defined; imported when it is first used.
_HOMES = {
    "benchmark": "qdeploy.evaluate.benchmark",
    "build_engine": "qdeploy.engines.build",
    "calibrate": "qdeploy.workflows.calibrate",
    "check": "qdeploy.evaluate.check",
    "collect": "qdeploy.calibration_set.collect",
    "demo": "qdeploy.workflows.demo",
    "export": "qdeploy.export.run",
    "load_checkpoint": "qdeploy.quant.checkpoint",
    "load_engine": "qdeploy.engines.build",
    "report": "qdeploy.evaluate.report_page.run",
    "sample": "qdeploy.sampling.sample",
    "sensitivity": "qdeploy.mixed.sensitivity",
}


class _Package(ModuleType):
    """This package, in which a public function stands before a subpackage of the same name.

    Importing ``qdeploy.calibrate.rounding`` makes the import system bind ``qdeploy.calibrate`` to the
    subpackage; here the name stays the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qdeploy' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package
