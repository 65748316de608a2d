"""The tables of what `benchmarks/rtx_builds.py` and `benchmarks/rtx_matrix.py` measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qdeploy.system.tables import MISSING, Table

MATRIX = "python -m benchmarks.rtx_matrix -o benchmarks/results/rtx-builds.json"
# How the names of bundles end, and what the engine computes in.
_SHOWN = {"f32": "f16", "w8a8": "int8", "int8": "int8", "fp8": "fp8"}
_PRECISION = re.compile(f"-({'|'.join(_SHOWN)})\\b")


def tables(content: Mapping[str, Any]) -> str:
    """Every bundle, and every format of the shipped models."""
    columns = (
        "graph",
        "layers as planned",
        "products by type",
        "MB of the plan",
        "MB moved a call",
        "s",
        "for",
    )
    rows = [
        [
            name.removeprefix("onnx-"),
            f"{build['as_planned']} of {build['planned']}",
            _counts(build["products"]),
            f"{build['plan_mb']:.1f}",
            f"{build['activations_mb']:.2f}",
            f"{build['moved_mb']:.2f}",
            f"{build['seconds']:.0f}",
            build["targets"],
        ]
        for name, build in content["bundles"].items()
    ]
    return Table(columns, rows).markdown() + _formats(content)


def _formats(content: Mapping[str, Any]) -> str:
    columns = (
        *("model", "format", "shapes", "layers as planned", "of them", "MB of the plan"),
        *("two builds equal", "s", "for"),
    )
    rows = [
        [
            row["model"],
            row["format"],
            row["shapes"],
            f"{row['as_planned']} of {row['planned']}",
            _counts(row["kinds"]),
            f"{row['plan_mb']:.1f}",
            "yes" if row["differing_bytes"] == 0 else f"the layers; {row['differing_bytes']} bytes differ",
            f"{row['seconds']:.1f}",
            row["targets"],
        ]
        for row in content["matrix"]
    ]
    said = f"By `{MATRIX}` (2026-11-30), on few rows; each is built twice."
    return f"\n## Every format\n\n{said}\n\n{Table(columns, rows).markdown()}"


def large(content: Mapping[str, Any]) -> str:
    """Networks of well-known shapes beside their engine in 16 bits, and what their kernels move."""
    builds = dict(sorted(content["bundles"].items()))
    columns = (
        *("graph", "layers as planned", "s", "GB of memory", "MB of the engine", "MB of activations"),
        *("beside f16", "all MB moved", "beside f16"),
    )
    rows = []
    for name, build in builds.items():
        beside = builds[_base(name)]
        rows.append(
            [
                _title(name),
                f"{build['as_planned']} of {build['planned']}" if build["planned"] else MISSING,
                f"{build['seconds']:.0f}",
                f"{build['peak_mb'] / 1e3:.1f}",
                f"{build['plan_mb']:.0f}",
                f"{build['activations_mb']:.0f}",
                f"{build['activations_mb'] / beside['activations_mb']:.2f}",
                f"{build['moved_mb']:.0f}",
                f"{build['moved_mb'] / beside['moved_mb']:.2f}",
            ]
        )
    kinds = sorted({kind for build in builds.values() for kind in build["kernels"]})
    moved = [
        [_title(name), *(f"{build['kernels'].get(kind, 0):.1f}" for kind in kinds)]
        for name, build in builds.items()
    ]
    by_kernel = Table(("MB of activations", *kinds), moved).markdown()
    return f"{Table(columns, rows).markdown()}\n## By kernel\n\n{by_kernel}"


def _base(name: str) -> str:
    """The bundle of the same shape that is not quantized: built in f16, like all."""
    return re.sub(_PRECISION, "-f32", name.partition(", made-up")[0])


def _title(name: str) -> str:
    return re.sub(_PRECISION, lambda found: f", {_SHOWN[found[1]]}", name)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())
