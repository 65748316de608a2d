"""Timestep-aware calibration on the zoo's ``digits``: each method with static scales and with groups of timesteps.

    python benchmarks/timesteps.py --output runs/timesteps

Calibrations that share their weights share the work of rounding them. What is measured is the engine on
OpenVINO, on images that no calibration has seen. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.evaluate.cached_json import cached_result
from qdeploy.evaluate.check import check
from qdeploy.evaluate.quality import QualityPlan, Trajectories
from qdeploy.evaluate.thresholds import look_up
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import CHECKING
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json, write_text
from qdeploy.system.machine import machine
from qdeploy.system.progress import say
from qdeploy.system.tables import MISSING, Table
from qdeploy.workflows.calibrate import calibrate

STEPS, GROUPS = 50, 4
WEIGHTS = {"w8a8": "int8", "w4a8": "int4"}
COLUMNS = {
    "SQNR dB, median": (("quality", "sqnr_db", "median"), 1),
    "worst": (("quality", "sqnr_db", "worst"), 1),
    "PSNR dB": (("quality", "psnr_db"), 1),
    "FD-local": (("quality", "fd_local", "subject"), 3),
    "FD to full precision": (("quality", "fd_local", "between"), 3),
    "parity dB": (("parity", "sqnr_db"), 1),
    "minutes": (("minutes",), 1),
}


@dataclass(frozen=True)
class Variant:
    """One way to calibrate.

    Attributes:
        name: row of the table.
        base: the variant whose weights it takes; empty if it rounds its own.
        recipe: what the recipe says beside precision and seed.
    """

    name: str
    base: str
    recipe: dict[str, Any]


def tail(method: str, mode: str = "") -> list[Any]:
    """What comes after the rounding of weights."""
    if method == "qdiffusion":
        return [{"activation-ranges": {"finder": "lp"}}, "learn-scales"]
    return [
        {"activation-ranges": {"finder": "running"}},
        "finite-set-ranges",
        {"temporal-selection": {"mode": mode}},
    ]


def variants() -> Iterator[Variant]:
    """The rows of the table."""
    yield Variant("minmax", "", {"method": "minmax"})
    yield Variant("minmax, groups", "", {"method": "minmax", "timestep_groups": GROUPS})
    yield Variant("qdiffusion", "", {"method": "qdiffusion"})
    groups = {"method": "qdiffusion", "timestep_groups": GROUPS, "stages": tail("qdiffusion")}
    yield Variant("qdiffusion, groups", "qdiffusion", groups)
    with_time = {"method": "qdiffusion", "coverage": "portable-time"}
    yield Variant("qdiffusion, time path too", "", with_time)
    yield Variant("tfmq, selected", "", {"method": "tfmq"})
    for mode in ("block", "cache"):
        yield Variant(f"tfmq, {mode}", "tfmq, selected", {"method": "tfmq", "stages": tail("tfmq", mode)})
    recipe = {"method": "tfmq", "timestep_groups": GROUPS, "stages": tail("tfmq", "selected")}
    yield Variant("tfmq, selected, groups", "tfmq, selected", recipe)


def slug(name: str) -> str:
    """A variant's name as part of a folder's name."""
    return name.replace(", ", "-").replace(" ", "-")


def checkpoint_of(output: Path, variant: Variant, precision: str, seed: int, effort: str) -> Artifact:
    """Collect and calibrate; what an earlier run has finished is taken up."""
    data = collect(
        "digits", output / f"set-{seed}", steps=STEPS, scheduler="ddim", seed=1000 * seed, batch=32
    )
    assert isinstance(data, Artifact)
    recipe = {**variant.recipe, "weights": WEIGHTS[precision], "activations": "int8", "effort": effort}
    recipe["seed"] = seed
    if variant.base:
        weights = output / f"{precision}-{slug(variant.base)}-{seed}"
        recipe["stages"] = [{"load-weights": {"checkpoint": str(weights)}}, *recipe["stages"]]
    name = f"{precision}-{slug(variant.name)}-{seed}"
    file = output / f"{name}.yaml"
    write_text(file, yaml.safe_dump(recipe))
    checkpoint = calibrate("digits", output / name, recipe=file, calibration=data)
    assert isinstance(checkpoint, Artifact)
    return checkpoint


def minutes_of(output: Path, checkpoint: Artifact, variant: Variant, precision: str, seed: int) -> float:
    """Time that a calibration takes, with the rounding that it took over."""
    seconds = checkpoint.measured.seconds
    if variant.base:
        base = output / f"{precision}-{slug(variant.base)}-{seed}" / "qdeploy.json"
        stages = json.loads(base.read_text())["measured"]["stage_seconds"]
        seconds += sum(took for name, took in stages.items() if "weight" in name or name.endswith("rounding"))
    return seconds / 60


def features_of(checkpoint: Artifact) -> dict[str, Any] | None:
    """What the checkpoint says of its temporal features, in numbers over all of them."""
    file = checkpoint.path / "unet" / "temporal.json"
    if not file.is_file():
        return None
    features = json.loads(file.read_text())["features"].values()
    return {
        "tables": sum(feature["chosen"] == "cache" for feature in features),
        "features": len(features),
        **{
            f"{kind} {what}": reduce(feature[key][kind] for feature in features)
            for kind in ("block", "cache")
            for what, key, reduce in (
                ("worst relative error", "relative_error", max),
                ("worst cosine", "worst_cosine", min),
            )
        },
    }


def only_tables(run: dict[str, Any]) -> bool:
    """Whether the selection chose the table for every feature."""
    assert run["variant"] == "tfmq, selected"
    return run["temporal"]["tables"] == run["temporal"]["features"]


def measure(output: Path, effort: str, seeds: list[int], samples: int) -> list[dict[str, Any]]:
    """One record for each calibration."""
    model = open_model("digits")
    plan = QualityPlan(replace(CHECKING, steps=STEPS, batch=32), samples)
    trajectories = cache(lambda: Trajectories(model, plan))
    runs = []
    for seed in seeds:
        for precision in WEIGHTS:
            for variant in variants():
                if runs and variant.name == "tfmq, cache" and only_tables(selected := runs[-2]):
                    runs.append({**selected, "variant": variant.name})  # the same calibration
                    continue
                checkpoint = checkpoint_of(output, variant, precision, seed, effort)
                bundle = export(checkpoint, Path(f"{checkpoint.path}-onnx"))
                place = Path(f"{checkpoint.path}-engine")
                engine = build_engine(bundle, place, backend="openvino", threads=1)
                file = output / "measured" / f"{engine.path.name}.json"

                def judge(engine: Artifact) -> dict[str, Any]:
                    return check(engine, trajectories=trajectories()).to_json()

                key = [engine.sha256, model.sha256, repr(plan)]
                result = cached_result(file, key, partial(judge, engine))
                runs.append(
                    {
                        "precision": precision,
                        "variant": variant.name,
                        "seed": seed,
                        "minutes": minutes_of(output, checkpoint, variant, precision, seed),
                        "temporal": features_of(checkpoint),
                        **result,
                    }
                )
                say(f"{engine.path.name}: {result['quality']['sqnr_db']['median']} dB")
    return runs


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows, the full-precision model first."""
    full = runs[0]["quality"]["fd_local"]["reference"]
    rows = [["full precision", *[f"{full:.3f}" if name == "FD-local" else MISSING for name in COLUMNS]]]
    for precision in WEIGHTS:
        for variant in variants():
            members = [r for r in runs if (r["precision"], r["variant"]) == (precision, variant.name)]
            if not members:
                continue
            cells = []
            for keys, digits in COLUMNS.values():
                values = [look_up(run, keys) for run in members]
                spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.{digits}f}{spread}")
            rows.append([f"{precision.upper()} {variant.name}", *cells])
    return rows


def main() -> None:
    """Measure, and write ``results.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/timesteps"))
    parser.add_argument("--effort", default="fast", choices=("fast", "balanced", "best"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one calibration each")
    parser.add_argument("--samples", type=int, default=256, help="images that quality is measured on")
    parser.add_argument("--threads", type=int, help="torch's threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = measure(arguments.output, arguments.effort, arguments.seeds, arguments.samples)
    columns, rows = ["model", *COLUMNS], table(runs)
    note = (
        f"{arguments.samples} images, DDIM {STEPS} steps, effort {arguments.effort}, {GROUPS} groups of timesteps; "
        f"mean ± deviation over {len(arguments.seeds)} calibrations"
    )
    write_json(arguments.output / "results.json", {"note": note, "machine": machine(), "runs": runs})
    write_text(arguments.output / "table.md", f"{Table(columns, rows).markdown()}\n{note}\n")
    print(Table(columns, rows).text())
    print(note)


if __name__ == "__main__":
    main()
