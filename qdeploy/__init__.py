"""qdeploy: from a diffusion model to a measured low-bit engine.

    import qdeploy

    data = qdeploy.collect("model/", "set/")
    checkpoint = qdeploy.calibrate("model/", "w4a8/", recipe="w4a8-qdiffusion-steady", calibration=data)
    engine = qdeploy.build_engine(qdeploy.export(checkpoint))
    pipe.unet = qdeploy.load_engine(engine).as_denoiser()

Nothing heavy is imported before one of these is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qdeploy.version import __version__

_PUBLIC = {
    "benchmark": "qdeploy.evaluate.benchmark",
    "build_engine": "qdeploy.engines.build",
    "calibrate": "qdeploy.calibrate.run",
    "check": "qdeploy.evaluate.check",
    "collect": "qdeploy.calibrate.trajectory",
    "demo": "qdeploy.evaluate.demo",
    "export": "qdeploy.export.run",
    "load_checkpoint": "qdeploy.calibrate.checkpoint",
    "load_engine": "qdeploy.engines.build",
    "report": "qdeploy.evaluate.report_page.run",
    "sample": "qdeploy.runtime.sample",
    "sensitivity": "qdeploy.mixed.run",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qdeploy' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
