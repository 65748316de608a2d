"""What a bundle's graph and the simulation compute on their way: quantizers and weighted layers of both, matched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.state import quantizers

WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Pair:
    """A Q with its DQ, and the simulation's quantizer.

    Attributes:
        name: of the layer, or of the quantizer where no layer reads it directly.
        source: the float tensor that is quantized.
        result: the same on the grid.
        quantizer: the simulation's.
    """

    name: str
    source: str
    result: str
    quantizer: ActivationQuantizer


@dataclass(frozen=True)
class Weighted:
    """A convolution or product of the graph, and the part of a layer that it computes."""

    node: onnx.NodeProto
    layer: QuantizedLayer
    part: int

    def expected(self, x: Tensor) -> Tensor:
        """What torch computes from the node's own input."""
        bias = self.layer.bias if self.part == 0 and len(self.node.input) > 2 else None
        with torch.no_grad():
            return self.layer.operate(x, self.layer.quantized_weights()[self.part], bias)


class Graph:
    """A graph whose quantizers and weighted nodes can be listened to, run without any optimization.

    Args:
        path: of the ONNX file; at most 2 GB.
        denoiser: the simulation that it was exported from.
    """

    def __init__(self, path: Path, denoiser: nn.Module) -> None:
        self.proto = onnx.load(path)
        self.weighted = list(self._weighted(quantized_layers(denoiser)))
        self.pairs = list(self._pairs(dict(quantizers(denoiser))))
        named = {p.source for p in self.pairs} | {p.result for p in self.pairs}
        named |= {name for w in self.weighted for name in (w.node.input[0], w.node.output[0])}
        known = {value.name for value in (*self.proto.graph.input, *self.proto.graph.output)}
        for name in sorted(named - known):
            kind = onnx.TensorProto.FLOAT
            self.proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(
            self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, row: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by name, for one row of inputs."""
        feed = {name: value.numpy() for name, value in row.items()}
        feed["timestep"] = feed["timestep"].reshape(()).astype(np.float32)
        names = [output.name for output in self._session.get_outputs()]
        values = dict(zip(names, map(torch.from_numpy, self._session.run(names, feed)), strict=True))
        return values | {name: torch.from_numpy(value) for name, value in feed.items()}

    def _weighted(self, layers: Mapping[str, QuantizedLayer]) -> Iterator[Weighted]:
        for node in self.proto.graph.node:
            if node.op_type not in WEIGHTED:
                continue
            path, _, part = node.name.rpartition("/")
            if node.name in layers:
                yield Weighted(node, layers[node.name], 0)
            elif path in layers and layers[path].split:
                yield Weighted(node, layers[path], int(part))

    def _pairs(self, by_name: Mapping[str, Any]) -> Iterator[Pair]:
        read = {w.node.input[0]: w for w in reversed(self.weighted)}
        back = {node.input[0]: node for node in self.proto.graph.node if node.op_type == "DequantizeLinear"}
        for node in self.proto.graph.node:
            if node.op_type != "QuantizeLinear":
                continue
            result = back[node.output[0]].output[0]
            reader = read.get(result)
            # Exporters merge equal scales: the name of one may be another's.
            own = reader.layer.activation_quantizers[reader.part] if reader is not None else None
            quantizer = own or by_name[node.input[1].removesuffix(".scale")]
            if not quantizer.simple:
                raise SystemExit("scales that depend on the timestep are not compared: take a static export")
            yield Pair(reader.node.name if reader else node.input[1], node.input[0], result, quantizer)


@contextmanager
def listening(denoiser: nn.Module) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within, what each quantizer of the simulation reads and gives is kept, by its `id`."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[id(module)] = (inputs[0], output)

    with _hooks(denoiser, keep):
        yield kept


@contextmanager
def forced(denoiser: nn.Module, results: Mapping[int, Tensor]) -> Iterator[None]:
    """Within, quantizers give these values, by their `id`, whatever they read."""

    def force(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return results.get(id(module), output)

    with _hooks(denoiser, force):
        yield


@contextmanager
def _hooks(denoiser: nn.Module, hook: Any) -> Iterator[None]:
    found = [m for m in denoiser.modules() if isinstance(m, ActivationQuantizer)]
    handles = [module.register_forward_hook(hook) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
