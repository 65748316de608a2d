"""Compare ONNX Runtime and TensorRT with Polygraphy: a check that is independent of qdeploy's own.

From the shell, with the library's own build of the plan:

    polygraphy run model.onnx --onnxrt --trt --strongly-typed --atol 1e-2 --rtol 1e-2

`compare` takes the plan that we built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines.tensorrt.plan import ENGINE, read_sidecar
from qdeploy.system.errors import CapabilityError
from qdeploy.system.gpu import require_gpu

if TYPE_CHECKING:
    import numpy as np

ABSOLUTE, RELATIVE = 1e-2, 1e-2


def compare(onnx_path: Path, plan: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Run a graph by ONNX Runtime and its plan by TensorRT, both through Polygraphy.

    Args:
        onnx_path: the graph.
        plan: the folder of the plan that was built of it.
        inputs: arrays by the names of the inputs.

    Returns:
        As of `outcome`.

    Raises:
        CapabilityError: no GPU, or Polygraphy is not installed.
        InvalidInputError: the plan is damaged.
    """
    require_gpu()
    read_sidecar(plan)
    require()
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    runners = [
        OnnxrtRunner(SessionFromOnnx(str(onnx_path))),
        TrtRunner(EngineFromBytes((plan / ENGINE).read_bytes())),
    ]
    return outcome(runners, inputs)


def require() -> None:
    """Make sure that Polygraphy is installed.

    Raises:
        CapabilityError: it is not.
    """
    try:
        import polygraphy  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise CapabilityError(
            "this comparison needs the package polygraphy: pip install polygraphy"
        ) from error


def outcome(runners: list[Any], inputs: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Compare two runners on one set of inputs.

    Returns:
        By output ``passed``, ``max_abs``, ``mean_abs``, ``median_abs``.
    """
    import numpy as np
    from polygraphy.comparator import Comparator, CompareFunc
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR  # it speaks on stdout, where results stand
    # ONNX Runtime takes arrays only, and an element of an array is none.
    feed = {name: np.asarray(x) for name, x in inputs.items()}
    results = Comparator.run(runners, data_loader=[feed])
    # The median: single elements differ by a whole step where a value lies between two codes.
    measure = CompareFunc.simple(atol=ABSOLUTE, rtol=RELATIVE, check_error_stat="median")
    accuracy = Comparator.compare_accuracy(results, compare_func=measure)
    # Newer versions give a list, one result for each way of comparing.
    result = accuracy if hasattr(accuracy, "values") else accuracy[0]
    (pair,) = result.values()
    return {
        name: {
            "passed": bool(found),
            "max_abs": float(found.max_absdiff),
            "mean_abs": float(found.mean_absdiff),
            "median_abs": float(found.median_absdiff),
        }
        for name, found in pair[0].items()
    }
