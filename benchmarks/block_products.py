"""What OpenVINO makes of products with weights in blocks: by precision, block, and group of dynamic activations.

    python -m benchmarks.block_products --output runs/block-products

A chain of six linear layers of 1152 by 1152 on 256 tokens, PixArt's at 256 pixels. Times are the processor's, on one
thread, medians of calls that take turns; beside them those of the float chain in bf16.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.block_products_report import table
from benchmarks.turns import cpu_ms
from qdeploy.engines.openvino import compile_options
from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.trace import export_program
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import freeze
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import FORMATS, Format, int8_dynamic
from qdeploy.store.files import write_json
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.system.machine import machine

TOKENS, WIDTH, LAYERS = 256, 1152, 6
WEIGHTS = ("int4b32", "int4b64", "int4b128", "int8b128")
GROUPS = (0, 32, 64, 128)


def chain(weights: Format | None) -> nn.Module:
    """The layers, in float or with weights in blocks and inputs that the runtime rounds."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(LAYERS)]
    if weights is None:
        return nn.Sequential(*layers)
    blocks = [QuantizedLayer(inner, weights, int8_dynamic) for inner in layers]
    for layer in blocks:
        for quantizer, weight in layer.weight_pairs():
            quantizer.set(*minmax_weights(weight, weights))
            quantizer.codes = quantizer.nearest(weight)
    return nn.Sequential(*blocks)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/block-products"))
    parser.add_argument("--calls", type=int, default=9)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    import openvino

    torch.set_num_threads(1)
    x = torch.randn(1, TOKENS, WIDTH)
    rows: list[dict[str, Any]] = []
    runs = []
    for name in ("float", *WEIGHTS):
        network = chain(FORMATS.get(name))
        exact = chain(None)(x)
        freeze(network)
        file = asked.output / f"{name}.onnx"
        target = "portable" if name == "float" else "openvino"
        save(lower(export_program(network, {"x": torch.cat([x, x])}, ("y",)), target), file)
        for precision in ("f32", "bf16"):
            for group in GROUPS if name != "float" else (0,):
                options = compile_options(precision, 1, group)
                compiled = openvino.Core().compile_model(str(file), "CPU", options)
                output = torch.from_numpy(compiled([x.numpy()])[0].copy()).float()
                found = {"weights": name, "precision": precision, "group": group}
                rows.append(found | {"sqnr_db": round(sqnr_by_row(output, exact)[0], 1)})
                runs.append(compiled)
    for row, took in zip(rows, cpu_ms([partial(run, [x.numpy()]) for run in runs], asked.calls), strict=True):
        row["cpu_ms"] = took
    write_json(asked.output / "block-products.json", {"machine": machine(), "results": rows})
    print(table(rows).markdown())


if __name__ == "__main__":
    main()
