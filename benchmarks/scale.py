"""What each stage costs at size: peak memory, seconds, and the estimate that was printed before, of a large model.

    python -m benchmarks.scale --shape sd15 --output runs/scale
    python -m benchmarks.scale --shape sdxl --stages model export-fp32
    python -m benchmarks.scale --stored bfloat16 --output runs/scale-bf16  # as most models are published

Every stage is the command line in a process of its own. Peak memory is the process's high-water mark as the
system tells it (VmHWM), which counts pages of files that are mapped; "own" is without those, sampled ten times a
second. What is there already is not made again. Writes ``SHAPE/scale.json`` and ``scale.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

from qdeploy.model.folder import open_model
from qdeploy.store.files import write_json, write_text
from qdeploy.system.machine import machine
from qdeploy.system.tables import MISSING, Table, number

STAGES = (*("model", "collect", "calibrate", "export", "build-engine", "check", "benchmark", "export-fp32"),)
# Where a verb says beforehand what it will take: "about 3 min, 10.3 GB".
ESTIMATE = re.compile(r"about ([\d.]+) (s|min|h), ([\d.]+) (kB|MB|GB)( on disk)?")
UNITS = {"s": 1, "min": 60, "h": 3600, "kB": 2**10, "MB": 2**20, "GB": 2**30}
COLUMNS = (
    "stage",
    "seconds",
    "CPU s",
    "said before, s",
    "took from then, s",
    "peak GB",
    "said before, GB",
    "of the weights",
    "own GB",
    "GB on disk",
    "note",
)
INTERVAL = 0.1
SHAPES = ("cifar", "sd217", "sd15", "pixart", "pixart-xl", "sdxl", "sdxl-512")


def commands(
    shape: str, folder: Path, images: int, steps: int, recipe: list[str], stored: str, collected: bool = True
) -> dict[str, list[str]]:
    """The command line of every stage; paths are those in ``folder``.

    Args:
        shape: of the network.
        folder: where everything lies.
        images: of the calibration set.
        steps: denoiser calls of each image.
        recipe: options of ``qdeploy calibrate``.
        stored: type of the weights on disk.
        collected: whether calibration takes a set.
    """
    from benchmarks.models import PROMPTS

    prompts = folder / "prompts.txt"
    write_text(prompts, "\n".join(PROMPTS) + "\n")
    model, places = str(folder / shape), {stage: str(folder / f"{shape}-{stage}") for stage in STAGES}
    qdeploy = [sys.executable, "-m", "qdeploy.cli"]
    sampled = ["--scheduler", "ddim", "--steps", str(steps), "--guidance", "1"]
    make = f"store_in(model_folder({shape!r}, Path({str(folder)!r})), {stored!r})"
    return {
        "model": [
            *(sys.executable, "-c"),
            f"from pathlib import Path; from benchmarks.models import model_folder, store_in; {make}",
        ],
        "collect": [
            *(*qdeploy, "collect", model, "-o", places["collect"], "--samples", str(images)),
            *("--keep", str(steps), "--batch", "1", "--prompts", str(prompts), *sampled),
        ],
        "calibrate": [
            *(*qdeploy, "calibrate", model, "-o", places["calibrate"], "--effort", "fast"),
            *(("--calibration", places["collect"]) if collected else ()),
            *recipe,
        ],
        "export": [
            *(*qdeploy, "export", places["calibrate"], "-o", places["export"], "--no-pipeline"),
            *(("--time-table", "fp32") if collected else ()),
        ],
        "build-engine": [
            *(*qdeploy, "build-engine", places["export"], "-o", places["build-engine"]),
            *("--backend", "openvino", "--precision", "f32", "--threads", "1"),
        ],
        "check": [*qdeploy, "check", places["build-engine"]],
        "benchmark": [*qdeploy, "benchmark", places["build-engine"], "--rounds", "1"],
        "export-fp32": [*qdeploy, "export", model, "-o", places["export-fp32"], "--no-pipeline"],
    }


def watched(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command: its exit code, seconds, the processor's seconds, and the most memory that it held, in bytes."""
    began, used, peak, own, said = time.perf_counter(), _used(), 0, 0, None
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if said is None and ESTIMATE.search(log.read_text()):
                said = time.perf_counter()
            told = _status(process.pid)
            peak, own = max(peak, told.get("VmHWM", 0)), max(own, told.get("RssAnon", 0))
            time.sleep(INTERVAL)
    end = time.perf_counter()
    return {
        "code": process.returncode,
        "seconds": end - began,
        "seconds_from_estimate": None if said is None else end - said,
        "cpu": _used() - used,
        "peak": peak,
        "own": own,
        "said": log.read_text(),
    }


def _used() -> float:
    """Seconds of the processor that finished commands took."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _status(process: int) -> dict[str, int]:
    """Memory of a process in bytes, by the system's names; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def said_before(text: str) -> dict[str, float]:
    """Seconds and bytes that a verb named before it began; of bytes on disk there is nothing to compare."""
    found = ESTIMATE.search(text)
    if found is None:
        return {}
    seconds, unit, size, size_unit, disk = found.groups()
    told = {"seconds": float(seconds) * UNITS[unit]}
    return told if disk else told | {"peak": float(size) * UNITS[size_unit]}


def cells(stage: str, row: dict[str, Any], weights: int) -> list[str]:
    """A row as text."""
    before = row["before"]
    return [
        stage,
        number(row["seconds"], 0),
        number(row.get("cpu"), 0),
        number(before.get("seconds"), 0),
        number(row.get("seconds_from_estimate"), 0),
        f"{row['peak'] / 1e9:.2f}",
        f"{before['peak'] / 1e9:.2f}" if "peak" in before else MISSING,
        f"{row['peak'] / weights:.2f}x",
        f"{row['own'] / 1e9:.2f}",
        f"{row['disk'] / 1e9:.2f}" if row.get("disk") else MISSING,
        "" if row["code"] == 0 else f"exit code {row['code']}: {row['last']}",
    ]


def main() -> None:
    """Run the stages that are not done, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="sd15",
    )
    parser.add_argument("--images", type=int, default=1, help="images of the calibration set")
    parser.add_argument("--steps", type=int, default=8, help="denoiser calls of each image, all kept")
    parser.add_argument("--stored", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--recipe", default="--method minmax", help="options of `qdeploy calibrate`")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES[:-1])
    parser.add_argument("--output", type=Path, default=Path("runs/scale"))
    arguments = parser.parse_args()
    folder = arguments.output
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    file = folder / f"{arguments.shape}-scale.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    recipe = shlex.split(arguments.recipe)
    collected = "collect" in {*arguments.stages, *rows}
    todo = commands(
        arguments.shape, folder, arguments.images, arguments.steps, recipe, arguments.stored, collected
    )
    for stage in arguments.stages:
        if rows.get(stage, {}).get("code") == 0:
            continue
        print(f"{arguments.shape}: {stage}", file=sys.stderr, flush=True)
        row = watched(todo[stage], folder / "logs" / f"{arguments.shape}-{stage}.txt")
        text = row.pop("said").strip()
        made = folder / f"{arguments.shape}-{stage}"
        row["disk"] = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        rows[stage] = row | {"before": said_before(text), "last": (text.splitlines() or [""])[-1][:200]}
        write_json(file, rows)
        if row["code"] not in (0, 3):  # 3: a threshold was missed, which stops nothing
            break
    denoiser = open_model(folder / arguments.shape)
    weights = sum(file.stat().st_size for file in denoiser.weights)
    kept = {name: {key: value for key, value in row.items() if key != "last"} for name, row in rows.items()}
    write_json(
        folder / f"{arguments.shape}-result.json",
        {
            "machine": machine(),
            "shape": arguments.shape,
            "stored": arguments.stored,
            "weights": weights,
            "stages": kept,
        },
    )
    table = [cells(stage, rows[stage], weights) for stage in STAGES if stage in rows]
    write_text(folder / f"{arguments.shape}-scale.md", Table(COLUMNS, table).markdown())
    print(Table(COLUMNS, table).text())
    print(f"weights: {weights / 1e9:.2f} GB on disk, in {arguments.stored}")


if __name__ == "__main__":
    main()
