"""The error that each quantizer alone causes in the network's prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qdeploy.engines.base import Engine
from qdeploy.engines.placement.switches import Switch
from qdeploy.export.graph.writer import Writer
from qdeploy.system.progress import track

if TYPE_CHECKING:
    from torch import Tensor

GATES = "qdeploy.gates"
Step = Callable[[str, "Callable[[], dict[str, Tensor]]"], "dict[str, Tensor]"]


def with_gates(model: ir.Model, switches: Sequence[Switch]) -> ir.Model:
    """A graph whose quantizers can be switched at run time.

    Args:
        model: the graph; it is changed.
        switches: which quantizers.

    Returns:
        The same graph with one more input, `GATES`: a bool for each switch, whether it quantizes.
    """
    gates = ir.Value(name=GATES, shape=ir.Shape([len(switches)]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.inputs.append(gates)
    by_name = {node.name: node for node in model.graph}
    for index, switch in enumerate(switches):
        source = by_name[switch.name].inputs[0]
        write = Writer(model, by_name[switch.name])
        place = write.constant(np.int64(index))
        gate = write.node("Gather", gates, place, shape=[], dtype=ir.DataType.BOOL, axis=0)
        for name in switch.nodes[1:]:
            rounded = by_name[name].outputs[0]
            users = list(rounded.uses())
            behind = Writer(model, by_name[name], behind=True)
            chosen = behind.node("Where", gate, rounded, source, shape=rounded.shape)
            for use in users:
                use.node.replace_input_with(use.idx, chosen)
    return model


def noise_of_each(
    engine: Engine, rows: Sequence[dict[str, Tensor]], count: int, step: Step
) -> tuple[Tensor, Tensor]:
    """The error that every quantizer alone causes in the prediction.

    Errors of rounding in different tensors are nearly independent, so that those of several quantizers add up.

    Args:
        engine: the graph of `with_gates`.
        rows: inputs of one call each.
        count: how many gates there are.
        step: keeps what it computes under a name, so that a stopped measurement continues.

    Returns:
        The predictions without any quantizer, ``[rows, ...]``; and the squared distance to them with one
        quantizer each, ``[count, rows]``, float64.
    """
    import torch

    def predictions(gates: Tensor) -> Tensor:
        return torch.cat([engine({**row, GATES: gates}) for row in rows])

    off = torch.zeros(count, dtype=torch.bool)
    plain = step("placement-plain", lambda: {"output": predictions(off)})["output"]
    powers = []
    for index in track(range(count), "errors of quantizers"):

        def alone(index: int = index) -> dict[str, Tensor]:
            gates = off.clone()
            gates[index] = True
            return {"noise": (predictions(gates).double() - plain.double()).flatten(1).square().sum(1)}

        powers.append(step(f"placement-noise-{index}", alone)["noise"])
    return plain, torch.stack(powers)
