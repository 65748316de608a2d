"""qdeploy: from a diffusion model to a measured low-bit engine.

    import qdeploy

    data = qdeploy.collect("model/", "set/")
    checkpoint = qdeploy.calibrate("model/", "w4a8/", recipe="w4a8-gptq", calibration=data)
    engine = qdeploy.build_engine(qdeploy.export(checkpoint))
    pipe.unet = qdeploy.load_engine(engine).as_denoiser()

Nothing heavy is imported before one of these is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qdeploy.system import telemetry
from qdeploy.version import __version__

telemetry.turn_off()  # before any of these libraries is imported

if TYPE_CHECKING:
    from qdeploy.calibrate.methods.awq import ScaleSalient
    from qdeploy.calibrate.methods.centering import CenterInputs
    from qdeploy.calibrate.methods.dgq import GroupChannels
    from qdeploy.calibrate.methods.dgq_attention import LogAttention
    from qdeploy.calibrate.methods.dgq_patches import GroupPatches
    from qdeploy.calibrate.methods.dgq_tokens import GroupTokens
    from qdeploy.calibrate.methods.gptq import GPTQ
    from qdeploy.calibrate.methods.load_weights import LoadWeights
    from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
    from qdeploy.calibrate.methods.qdiffusion import AdaRound, LearnScales
    from qdeploy.calibrate.methods.qncd import MeasureErrors, SmoothEmbeddings
    from qdeploy.calibrate.methods.quest import AlignAttention, AlignEnd, AlignTime
    from qdeploy.calibrate.methods.rotation import Rotate
    from qdeploy.calibrate.methods.smoothquant import MigrateOutliers
    from qdeploy.calibrate.methods.svdquant import LowRank
    from qdeploy.calibrate.methods.tfmq import FiniteSetRanges, TemporalRounding, TemporalSelection
    from qdeploy.calibration_set.collect import collect
    from qdeploy.calibration_set.record import record
    from qdeploy.engines.build import build_engine, load_engine
    from qdeploy.engines.doctor import doctor
    from qdeploy.engines.selftest.run import selftest
    from qdeploy.evaluate.benchmark import benchmark
    from qdeploy.evaluate.check import check
    from qdeploy.evaluate.report_page.run import report
    from qdeploy.export.gguf import export_gguf
    from qdeploy.export.lint.run import lint
    from qdeploy.export.run import export
    from qdeploy.mixed.sensitivity import sensitivity
    from qdeploy.model.importing.run import import_model
    from qdeploy.model.sampling import Sampling
    from qdeploy.quant.checkpoint import load_checkpoint
    from qdeploy.recipe.recipe import Recipe
    from qdeploy.recipe.stages import Method, Stage
    from qdeploy.sampling.correct import correct
    from qdeploy.sampling.pipeline_folder import load_pipeline
    from qdeploy.sampling.sample import sample
    from qdeploy.store.sign import sign, verify
    from qdeploy.workflows.auto import auto
    from qdeploy.workflows.calibrate import calibrate
    from qdeploy.workflows.demo import demo
    from qdeploy.workflows.import_checkpoint import import_checkpoint
    from qdeploy.workflows.init import init
    from qdeploy.workflows.inspect import inspect, methods
    from qdeploy.workflows.packaging.run import package
    from qdeploy.workflows.preflight import preflight
    from qdeploy.workflows.sweep import sweep
    from qdeploy.workflows.tune import tune
    from qdeploy.workflows.work import work

__all__ = [
    "GPTQ",
    "ActivationRanges",
    "AdaRound",
    "AlignAttention",
    "AlignEnd",
    "AlignTime",
    "CenterInputs",
    "FiniteSetRanges",
    "GroupChannels",
    "GroupPatches",
    "GroupTokens",
    "LearnScales",
    "LoadWeights",
    "LogAttention",
    "LowRank",
    "MeasureErrors",
    "Method",
    "MigrateOutliers",
    "Recipe",
    "Rotate",
    "Sampling",
    "ScaleSalient",
    "SmoothEmbeddings",
    "Stage",
    "TemporalRounding",
    "TemporalSelection",
    "WeightRanges",
    "__version__",
    "auto",
    "benchmark",
    "build_engine",
    "calibrate",
    "check",
    "collect",
    "correct",
    "demo",
    "doctor",
    "export",
    "export_gguf",
    "import_checkpoint",
    "import_model",
    "init",
    "inspect",
    "lint",
    "load_checkpoint",
    "load_engine",
    "load_pipeline",
    "methods",
    "package",
    "preflight",
    "record",
    "report",
    "sample",
    "selftest",
    "sensitivity",
    "sign",
    "sweep",
    "tune",
    "verify",
    "work",
]

# Where public names are defined; a module is imported when one of its names is first used.
_NAMES = {
    "qdeploy.calibrate.methods.awq": ("ScaleSalient",),
    "qdeploy.calibrate.methods.centering": ("CenterInputs",),
    "qdeploy.calibrate.methods.dgq": ("GroupChannels",),
    "qdeploy.calibrate.methods.dgq_attention": ("LogAttention",),
    "qdeploy.calibrate.methods.dgq_patches": ("GroupPatches",),
    "qdeploy.calibrate.methods.dgq_tokens": ("GroupTokens",),
    "qdeploy.calibrate.methods.gptq": ("GPTQ",),
    "qdeploy.calibrate.methods.load_weights": ("LoadWeights",),
    "qdeploy.calibrate.methods.minmax": (
        "ActivationRanges",
        "WeightRanges",
    ),
    "qdeploy.calibrate.methods.qdiffusion": (
        "AdaRound",
        "LearnScales",
    ),
    "qdeploy.calibrate.methods.qncd": (
        "MeasureErrors",
        "SmoothEmbeddings",
    ),
    "qdeploy.calibrate.methods.quest": (
        "AlignAttention",
        "AlignEnd",
        "AlignTime",
    ),
    "qdeploy.calibrate.methods.rotation": ("Rotate",),
    "qdeploy.calibrate.methods.smoothquant": ("MigrateOutliers",),
    "qdeploy.calibrate.methods.svdquant": ("LowRank",),
    "qdeploy.calibrate.methods.tfmq": (
        "FiniteSetRanges",
        "TemporalRounding",
        "TemporalSelection",
    ),
    "qdeploy.calibration_set.collect": ("collect",),
    "qdeploy.calibration_set.record": ("record",),
    "qdeploy.engines.build": (
        "build_engine",
        "load_engine",
    ),
    "qdeploy.engines.doctor": ("doctor",),
    "qdeploy.engines.selftest.run": ("selftest",),
    "qdeploy.evaluate.benchmark": ("benchmark",),
    "qdeploy.evaluate.check": ("check",),
    "qdeploy.evaluate.report_page.run": ("report",),
    "qdeploy.export.gguf": ("export_gguf",),
    "qdeploy.export.lint.run": ("lint",),
    "qdeploy.export.run": ("export",),
    "qdeploy.mixed.sensitivity": ("sensitivity",),
    "qdeploy.model.importing.run": ("import_model",),
    "qdeploy.model.sampling": ("Sampling",),
    "qdeploy.quant.checkpoint": ("load_checkpoint",),
    "qdeploy.recipe.recipe": ("Recipe",),
    "qdeploy.recipe.stages": (
        "Method",
        "Stage",
    ),
    "qdeploy.sampling.pipeline_folder": ("load_pipeline",),
    "qdeploy.sampling.correct": ("correct",),
    "qdeploy.sampling.sample": ("sample",),
    "qdeploy.store.sign": ("sign", "verify"),
    "qdeploy.workflows.auto": ("auto",),
    "qdeploy.workflows.calibrate": ("calibrate",),
    "qdeploy.workflows.demo": ("demo",),
    "qdeploy.workflows.import_checkpoint": ("import_checkpoint",),
    "qdeploy.workflows.init": ("init",),
    "qdeploy.workflows.inspect": (
        "inspect",
        "methods",
    ),
    "qdeploy.workflows.packaging.run": ("package",),
    "qdeploy.workflows.preflight": ("preflight",),
    "qdeploy.workflows.sweep": ("sweep",),
    "qdeploy.workflows.tune": ("tune",),
    "qdeploy.workflows.work": ("work",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


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
