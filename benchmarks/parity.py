"""Layer by layer: does ONNX Runtime compute what the fake-quantized torch layers compute, and where do they part?

    python -m benchmarks.parity CHECKPOINT ONNX [--rows 4]

*Given the layer's own input*: every scale in the graph beside the checkpoint's, bit for bit; every quantized tensor
of ONNX Runtime beside torch's quantizer on the same floats, in steps; every convolution and product of ONNX Runtime
beside torch's on the same input, relative to the output's largest value.

*End to end*: both networks on the same rows. "Given its roundings" is torch with each quantizer's output replaced by
what ONNX Runtime rounded to: if these agree to the last bits, nothing but roundings that fell to other sides parts
the two. Quantizer by quantizer, in the order of the graph: how far apart the floats are that it reads, what part of
the codes differ, and what part of them would by chance, which is the mean distance of the floats in steps.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.parity_values import Graph, forced, listening
from qdeploy.engines.measure import single_rows
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.store.artifact import Artifact, Bundle, Checkpoint, open_artifact
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import decibels, powers, sqnr_db
from qdeploy.system.tables import Table

HEADER = ("quantizer", "of", "floats apart, dB", "codes that differ", "by chance", "steps")


def equal_scales(checkpoint: Artifact, graph: onnx.ModelProto) -> tuple[int, int]:
    """How many scales of the graph are in the checkpoint bit for bit, and how many there are."""
    component = checkpoint.facts.component
    stored = load_file(checkpoint.file(f"{component}/quantized.safetensors"))
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    used = {n.input[1] for n in graph.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    equal = sum(stored[name].numpy().tobytes() == scales[name].tobytes() for name in used if name in stored)
    return equal, len(used)


class Counts:
    """Sums over rows."""

    def __init__(self) -> None:
        self.steps, self.errors = 0, dict[str, float]()
        self.growth: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.rows: dict[str, list[float]] = defaultdict(list)

    def given_own_input(self, graph: Graph, values: dict[str, Tensor]) -> None:
        for pair in graph.pairs:
            with torch.no_grad():
                ours = pair.quantizer(values[pair.source])
            self.steps = max(self.steps, _apart(ours, values[pair.result], pair.quantizer))
        for weighted in graph.weighted:
            expected = weighted.expected(values[weighted.node.input[0]])
            apart = (expected - values[weighted.node.output[0]]).abs().max() / expected.abs().max()
            name = weighted.node.name
            self.errors[name] = max(self.errors.get(name, 0.0), float(apart))

    def end_to_end(self, graph: Graph, denoiser: Any, row: dict[str, Tensor], output: str) -> None:
        values = graph.run(row)
        self.given_own_input(graph, values)
        with torch.no_grad(), listening(denoiser) as kept:
            simulated = denoise(denoiser, row)
        roundings = {id(pair.quantizer): values[pair.result] for pair in graph.pairs}
        with torch.no_grad(), forced(denoiser, roundings):
            given = denoise(denoiser, row)
        self.rows["end_to_end_db"].append(sqnr_db(values[output], simulated))
        self.rows["given_its_roundings_db"].append(sqnr_db(values[output], given))
        for pair in graph.pairs:
            x, rounded = kept[id(pair.quantizer)]
            chance = ((x - values[pair.source]).abs() / steps_at(x, pair.quantizer)).clamp(max=1)
            signal, noise = powers(values[pair.source], x)
            sums = self.growth[pair.name]
            for key, value in (("signal", signal), ("noise", noise), ("count", float(x.numel()))):
                sums[key] += value
            sums["differ"] += float((rounded != values[pair.result]).sum())
            sums["chance"] += float(chance.double().sum())
            sums["steps"] = max(sums["steps"], _apart(rounded, values[pair.result], pair.quantizer))

    def to_json(self) -> dict[str, Any]:
        growth = [
            {
                "quantizer": name,
                "floats_db": round(decibels(sums["signal"], sums["noise"]), 1),
                "codes_differ": sums["differ"] / sums["count"],
                "by_chance": sums["chance"] / sums["count"],
                "steps": int(sums["steps"]),
            }
            for name, sums in self.growth.items()
        ]
        both = {key: {"median": median(rows), "worst": min(rows)} for key, rows in self.rows.items()}
        return {
            "largest_difference_in_steps": self.steps,
            "largest_relative_difference_of_outputs": max(self.errors.values()),
            "relative_difference_by_layer": self.errors,
            **both,
            "growth": growth,
        }


def steps_at(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """The distance between neighbours of the grid, at each element of a tensor."""
    if not quantizer.format.floating:
        return quantizer.scale
    exponents = (
        torch.frexp(x / quantizer.scale).exponent - 1
    )  # E4M3: three bits behind the point, down to 2^-9
    return quantizer.scale * torch.exp2((exponents - 3).clamp(min=-9).float())


def _apart(one: Tensor, other: Tensor, quantizer: ActivationQuantizer) -> int:
    """The largest distance of two rounded tensors, in steps."""
    larger = torch.where(one.abs() > other.abs(), one, other)
    return int(torch.round(((one - other).abs() / steps_at(larger, quantizer)).max()))


def growth_table(growth: list[dict[str, Any]]) -> str:
    """The quantizers at doubling depths, and the last."""
    chosen = sorted({min(2**k, len(growth)) - 1 for k in range(len(growth).bit_length() + 1)})
    rows = [
        [growth[i]["quantizer"], f"{i + 1}/{len(growth)}", f"{growth[i]['floats_db']:.1f}"]
        + [f"{growth[i][key]:.2%}" for key in ("codes_differ", "by_chance")]
        + [str(growth[i]["steps"])]
        for i in chosen
    ]
    return Table(HEADER, rows).text()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--rows", type=int, help="how many rows of the probe; all by default")
    parser.add_argument("--json", type=Path, help="where to write everything, layer by layer")
    arguments = parser.parse_args()
    checkpoint = open_artifact(arguments.checkpoint, Checkpoint)
    bundle = open_artifact(arguments.onnx, Bundle)
    denoiser = load_checkpoint(checkpoint).requires_grad_(False)
    graph = Graph(bundle.graph, denoiser)
    output = graph.proto.graph.output[0].name
    counts, rows = Counts(), single_rows(read_probe(bundle.path)[0])[: arguments.rows]
    for row in rows:
        counts.end_to_end(graph, denoiser, row, output)
    equal, used = equal_scales(checkpoint, graph.proto)
    result = {
        "scales": used,
        "scales_bit_equal": equal,
        "rows": len(rows),
        "quantized_tensors": len(graph.pairs),
    }
    result |= counts.to_json()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    print(growth_table(result["growth"]))
    brief = {
        key: value for key, value in result.items() if key not in ("growth", "relative_difference_by_layer")
    }
    print(json.dumps(brief, indent=2))


if __name__ == "__main__":
    main()
