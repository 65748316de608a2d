"""An ONNX graph as every part of qdeploy reads it: lint rules, rewrites, placement, counts and TensorRT.

`qdeploy.export.graph.file` reads and writes files, `nodes` answers questions about single values, `quantizer` about
single Q and DQ nodes, `network` about a whole graph with the shapes and types that follow from its inputs.
"""

from qdeploy.export.graph.file import LARGE, read, save
from qdeploy.export.graph.nodes import (
    INTEGER_PRODUCT,
    MOVES,
    WEIGHTED,
    WEIGHTED_OPS,
    beside_a_layer,
    block_size,
    constant,
    label,
    producer,
    store,
    stored,
    upstream,
)

__all__ = [
    "INTEGER_PRODUCT",
    "LARGE",
    "MOVES",
    "WEIGHTED",
    "WEIGHTED_OPS",
    "beside_a_layer",
    "block_size",
    "constant",
    "label",
    "producer",
    "read",
    "save",
    "store",
    "stored",
    "upstream",
]
