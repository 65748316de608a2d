"""Layer by layer: does ONNX Runtime compute what the fake-quantized torch layers compute?

    python benchmarks/parity.py CHECKPOINT ONNX

Three counts. Scales: every scale in the graph beside the checkpoint's, bit for bit. Codes: every quantized tensor
of ONNX Runtime beside torch's quantizer on the same float input, in steps. Outputs: every convolution and linear
layer of ONNX Runtime beside torch's layer on the same input, relative to the output's largest value.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import load_file

from qdeploy.artifact import Artifact, open_artifact
from qdeploy.calibrate.checkpoint import load_checkpoint
from qdeploy.calibrate.fakequant import quantized_layers
from qdeploy.calibrate.quantizers import ActivationQuantizer
from qdeploy.calibrate.state import quantizers

WEIGHTED = ("Conv", "Gemm", "MatMul")


def equal_scales(checkpoint: Artifact, graph: onnx.ModelProto) -> tuple[int, int]:
    """How many scales of the graph are in the checkpoint bit for bit, and how many there are."""
    component = checkpoint.facts["component"]
    stored = load_file(checkpoint.file(f"{component}/quantized.safetensors"))
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    used = {n.input[1] for n in graph.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    equal = sum(stored[name].numpy().tobytes() == scales[name].tobytes() for name in used if name in stored)
    return equal, len(used)


def run_with_everything(
    path: Path, feed: dict[str, np.ndarray]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The graph and the value of every input and output of quantizers and weighted nodes."""
    graph = onnx.load(path)
    wanted = {
        name: kind
        for node in graph.graph.node
        if node.op_type in ("QuantizeLinear", *WEIGHTED)
        for name, kind in (
            (node.input[0], onnx.TensorProto.FLOAT),
            (
                node.output[0],
                onnx.TensorProto.INT8 if node.op_type == "QuantizeLinear" else onnx.TensorProto.FLOAT,
            ),
        )
    }
    known = {value.name for value in (*graph.graph.input, *graph.graph.output)}
    for name, kind in wanted.items():
        if name not in known:
            graph.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return graph, dict(zip(names, session.run(names, feed), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("onnx", type=Path)
    arguments = parser.parse_args()
    checkpoint, bundle = (
        open_artifact(arguments.checkpoint, "checkpoint"),
        open_artifact(arguments.onnx, "onnx"),
    )
    path = bundle.file(f"{bundle.facts['component']}/model.onnx")
    denoiser = load_checkpoint(checkpoint)
    probe = load_file(bundle.file("probe.safetensors"))
    layers = quantized_layers(denoiser)
    found = {name: q for name, q in quantizers(denoiser) if isinstance(q, ActivationQuantizer)}
    steps, outputs, rows = 0, 0.0, len(probe["input.timestep"])
    for row in range(rows):
        feed = {n[6:]: x[row : row + 1].numpy() for n, x in probe.items() if n.startswith("input.")}
        feed["timestep"] = feed["timestep"].reshape(()).astype(np.float32)
        graph, values = run_with_everything(path, feed)
        for node in graph.graph.node:
            if node.op_type == "QuantizeLinear":
                quantizer = found[node.input[1].removesuffix(".scale")]
                x = torch.from_numpy(values[node.input[0]])
                codes = torch.round(quantizer(x) / quantizer.scale).numpy()
                steps = max(steps, int(np.abs(codes - values[node.output[0]]).max()))
            elif node.op_type == "Conv" and node.name in layers and not layers[node.name].split:
                codes = torch.from_numpy(values[node.input[0]])
                layer = layers[node.name]
                layer.input_quantizers.requires_grad_(False)
                with torch.no_grad():
                    expected = layer(codes)
                actual = torch.from_numpy(values[node.output[0]])
                outputs = max(outputs, float((expected - actual).abs().max() / expected.abs().max()))
    equal, used = equal_scales(checkpoint, onnx.load(path))
    result = {
        "scales": used,
        "scales_bit_equal": equal,
        "rows": rows,
        "quantized_tensors": len(found),
        "largest_difference_in_steps": steps,
        "largest_relative_difference_of_outputs": outputs,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
