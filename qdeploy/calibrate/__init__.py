"""Calibration: from a full-precision denoiser to integer weights and scales.

The package is callable: ``qdeploy.calibrate(...)`` is `qdeploy.calibrate.run.calibrate`.
"""

from qdeploy.verbs import make_callable

make_callable(__name__, "qdeploy.calibrate.run")
