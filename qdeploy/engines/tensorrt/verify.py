"""A graph as it stands, built by the real builder: what `qdeploy lint --verify` reports in addition to the rules."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.child import build_in_child
from qdeploy.engines.tensorrt.flavour import FLAVOURS
from qdeploy.engines.tensorrt.gpu_targets import parse_gpus
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.inspector import dtype, kernels, multiplies, report, wide_results
from qdeploy.engines.tensorrt.layer_log import parse_layer_log
from qdeploy.engines.tensorrt.options import Options
from qdeploy.engines.tensorrt.profiles import check_profiles, default_profile, describe, parse_shapes
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.engines.tensorrt.worker import BuildRequest
from qdeploy.system.errors import InvalidInputError


@dataclass(frozen=True)
class BuildVerdict:
    """What the builder did with a graph.

    Attributes:
        engine: the library and its version.
        targets: the GPUs that it was asked to compile for.
        built: whether it built an engine.
        reason: why not.
        report: see `qdeploy.engines.tensorrt.inspector.report`, and ``float32_results``; empty if not built.
        kernels: number of kernels; 0 if not built.
        products: the plan's matrix products, as ``type -> type of the result``.
    """

    engine: str
    targets: tuple[int, ...]
    built: bool
    reason: str
    report: dict[str, Any]
    kernels: int
    products: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people; RUN says that this was executed."""
        where = f"{self.engine} for {', '.join(f'sm{sm}' for sm in self.targets)}"
        if not self.built:
            return [f"RUN {where}: refused: {self.reason}"]
        found = self.report
        said = [
            f"RUN {where}: built, {self.kernels} kernels; {found['as_planned']} of {found['planned']} quantized "
            "products run in their type"
        ]
        wrong = {
            **found["in_float"],
            **found["in_other"],
            **dict.fromkeys(found["not_found"], "not found in the plan"),
        }
        said += [f"RUN {name}: {what}" for name, what in list(wrong.items())[:5]]
        if len(wrong) > 5:
            said.append(f"RUN and {len(wrong) - 5} more")
        if wide := found["float32_results"]:
            said.append(f"RUN {len(wide)} low-bit products write float32, first {next(iter(wide))}")
        return said


def verify(
    source: str | Path,
    *,
    gpu: str = "sm89",
    shapes: str | None = None,
    backend: str = "tensorrt-rtx",
    minutes: float | None = 60.0,
) -> BuildVerdict:
    """Have the builder build a graph as it stands, in a process of its own.

    Args:
        source: an ONNX file, or an ONNX bundle, whose denoiser is meant.
        gpu: GPUs to compile for.
        shapes: profiles (see `qdeploy.engines.tensorrt.profiles.parse_shapes`); one batch of 1 to 2 if None.
        backend: the library, a name of `qdeploy.engines.tensorrt.flavour.FLAVOURS`.
        minutes: limit of time; none if None.

    Raises:
        CapabilityError: the library is not installed, or the limit is reached.
        UsageError: the shapes do not fit the graph, or a GPU is unknown.
        InvalidInputError: the file is no ONNX graph.
    """
    from qdeploy.export.lint.run import graph_file
    from qdeploy.export.products import products

    flavour, path = FLAVOURS[backend], graph_file(Path(source))
    targets = parse_gpus(gpu, flavour)
    graph = read_graph(path, refuse=False)
    profiles = [default_profile(graph.inputs, 1)] if shapes is None else list(parse_shapes(shapes))
    profiles = [profile for profile in profiles if profile]
    check_profiles(profiles, graph.inputs)
    engine = f"{flavour.backend} {load_tensorrt(flavour).__version__}"
    request = BuildRequest(
        flavour.backend, path, path, describe(profiles), Options(time_limit=minutes), targets, None
    )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            built = build_in_child(request, Path(scratch))
        except InvalidInputError as error:
            return BuildVerdict(engine, targets, False, str(error), {}, 0, ())
    layers = parse_layer_log(built.layers or "")
    found = products(path)
    planned = {product.name: product.kind for product in found if product.kind}
    per_channel = {product.name for product in found if product.per_channel}
    made = report(layers, planned) | {"float32_results": wide_results(layers, planned, per_channel)}
    return BuildVerdict(engine, targets, True, "", made, len(layers), tuple(product_types(layers)))


def product_types(layers: list[dict[str, Any]]) -> list[str]:
    """The matrix products of a plan, each as ``type -> type of the result``."""
    return [
        f"{kernel.precision} -> {', '.join(dtype(tensor) for tensor in layer.get('Outputs', []))}"
        for layer, kernel in zip(layers, kernels(layers), strict=True)
        if multiplies(kernel)
    ]
