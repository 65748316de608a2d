"""Kill every stage at random moments, resume it, and compare what comes out with an undisturbed run.

    python benchmarks/interruptions.py --kills 10

For each stage: one undisturbed run gives the expected identity; then, again and again, the stage is started in
a process of its own, killed with SIGKILL at a random moment, and run again to the end. After each kill the
output must not exist or be whole; after each resume its identity must be the expected one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from qdeploy.store.artifact import open_artifact

SMALL = ["--samples", "32", "--batch", "8", "--steps", "10", "--inference-steps", "20", "--scheduler", "ddim"]
RECIPE = """
method: qdiffusion
weights: int4
activations: int8
effort: fast
stages: [{weight-ranges: {finder: lp}}, {round-weights: {}}, {activation-ranges: {finder: lp}}, {learn-scales: {}}]
exclude: ["down_blocks*", "mid_block*", "up_blocks.0*", "up_blocks.1*"]
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "qdeploy.cli", *map(str, words), "--json"]


def stages(folder: Path, suffix: str) -> dict[str, tuple[Path, list[str]]]:
    """Each stage's output and command line; inputs come from the undisturbed run."""
    return {
        "collect": (folder / f"set{suffix}", command("collect", "digits", "-o", folder / f"set{suffix}", *SMALL)),
        "calibrate": (
            folder / f"checkpoint{suffix}",
            command(
                "calibrate", "digits", "-o", folder / f"checkpoint{suffix}", "--calibration", folder / "set",
                "-r", folder / "recipe.yaml",
            ),
        ),
        "export": (
            folder / f"onnx{suffix}",
            command("export", folder / "checkpoint", "-o", folder / f"onnx{suffix}"),
        ),
        "build-engine": (
            folder / f"engine{suffix}",
            command("build-engine", folder / "onnx", "-o", folder / f"engine{suffix}"),
        ),
        "sample": (
            folder / f"samples{suffix}",
            command("sample", folder / "engine", "-o", folder / f"samples{suffix}", "-n", 32, "--batch", 4),
        ),
    }  # fmt: skip


def identity(line: list[str]) -> str:
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return str(json.loads(done.stdout)["sha256"])


def interrupted(line: list[str], output: Path, moment: float) -> str:
    """Kill a run after ``moment`` seconds; say what stood at the output."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not output.exists():
        return "absent"
    open_artifact(output)
    return "whole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/interruptions"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*")
    arguments = parser.parse_args()
    folder, generator = arguments.folder, random.Random(arguments.seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    failures = 0
    for stage, (_, line) in stages(folder, "").items():
        began = time.perf_counter()
        expected = identity(line)
        seconds = time.perf_counter() - began
        if arguments.stages and stage not in arguments.stages:
            continue
        seen = []
        for kill in range(arguments.kills):
            output, again = stages(folder, f"-{kill}")[stage]
            for leftover in (
                output,
                *(output.parent / f".{output.name}.{kind}" for kind in ("work", "parts")),
            ):
                shutil.rmtree(leftover, ignore_errors=True)
            moment = generator.uniform(0.2, 1.0) * seconds
            state = interrupted(again, output, moment)
            same = identity(again) == expected
            failures += not same
            seen.append(f"{moment:.1f}s {state}{'' if same else ' DIFFERENT'}")
            shutil.rmtree(output)
        print(
            f"{stage}: {seconds:.1f} s undisturbed, {expected[:12]}; killed at {', '.join(seen)}", flush=True
        )
    print(f"{failures} of the resumed runs differ")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
