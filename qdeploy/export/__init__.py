"""Export: from a checkpoint to an ONNX graph with Q/DQ.

The package is callable: ``qdeploy.export(...)`` is `qdeploy.export.run.export`.
"""

from qdeploy.verbs import make_callable

make_callable(__name__, "qdeploy.export.run")
