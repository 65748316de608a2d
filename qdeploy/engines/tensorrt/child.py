"""The builder in a process of its own, with limits on time and memory; a crash becomes an error in one sentence."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.flavour import FLAVOURS
from qdeploy.engines.tensorrt.options import GIB
from qdeploy.engines.tensorrt.worker import ANSWER, LOG, PLAN, BuildRequest
from qdeploy.system import errors
from qdeploy.system.errors import CapabilityError, InvalidInputError, QDeployError

_TICK = 0.05  # seconds between two looks at the child
_PARSED = "VERBOSE Parsing node: "
_TAIL = 2**18  # bytes of the log's end that are searched for a node


@dataclass(frozen=True)
class Built:
    """What a build left in its folder.

    Attributes:
        plan: the plan's file.
        layers: the builder's list of layers, if it logged one.
        seconds: how long the child ran.
        peak_bytes: the most memory that it held, if the system tells.
    """

    plan: Path
    layers: str | None
    seconds: float
    peak_bytes: int | None


def build_in_child(request: BuildRequest, folder: Path) -> Built:
    """Run the builder in a child process.

    Args:
        request: what to build; its options hold the limits.
        folder: an empty folder for the request, the log and the plan.

    Raises:
        InvalidInputError: the library refuses the graph, or crashes on it.
        CapabilityError: it lacks an option, or a limit of time or memory is reached.
    """
    file = folder / "request.json"
    file.write_text(json.dumps(request.to_json()))
    began = time.monotonic()
    command = [sys.executable, "-m", "qdeploy.engines.tensorrt.worker", str(file)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        _watch(child, request, folder, began)
    finally:  # an interrupt too must leave nothing running
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()
    seconds = time.monotonic() - began
    answer_file = folder / ANSWER
    if child.returncode != 0 or not answer_file.is_file():
        raise InvalidInputError(_crashed(child.returncode, request, folder))
    return built_from(json.loads(answer_file.read_text()), folder, seconds)


def built_from(answer: Mapping[str, Any], folder: Path, seconds: float) -> Built:
    """What a worker's answer says.

    Raises:
        QDeployError: the worker answered with an error, of the kind that it names.
    """
    if "error" in answer:
        kind = getattr(errors, answer["error"], QDeployError)
        raise kind(answer["message"])
    return Built(folder / PLAN, answer["layers"], round(seconds, 3), answer.get("peak_bytes"))


def _watch(child: subprocess.Popen[bytes], request: BuildRequest, folder: Path, began: float) -> None:
    """Wait for the child, and end it at a limit."""
    title, options = FLAVOURS[request.backend].title, request.options
    while child.poll() is None:
        if options.time_limit is not None and time.monotonic() - began > 60 * options.time_limit:
            raise CapabilityError(
                f"{title} was stopped after {options.time_limit:g} minutes, the limit of --time-limit, at "
                f"{_place(folder)}: raise the limit, or build with a lower --optimization-level"
            )
        held = _memory(child.pid) or 0
        if options.memory_limit is not None and held > options.memory_limit * GIB:
            raise CapabilityError(
                f"{title} was stopped when it held {held / GIB:.2f} GiB, more than --memory-limit "
                f"{options.memory_limit:g}, at {_place(folder)}: raise the limit, or build on a larger machine"
            )
        time.sleep(_TICK)


def _memory(pid: int) -> int | None:
    """Bytes of memory that a process holds now; None where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(found[0]) if found else None


def _crashed(code: int, request: BuildRequest, folder: Path) -> str:
    try:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    except ValueError:
        how = f"by signal {-code}"
    return (
        f"{FLAVOURS[request.backend].title} crashed {how} while it built {request.source.name}, at "
        f"{_place(folder)}: `qdeploy lint` names what the library "
        "cannot build"
    )


def _place(folder: Path) -> str:
    """How far a build came: the last node that its log names."""
    lines = list(_last_lines(folder / LOG))
    if not lines:
        return "its start"
    parsed = next((line for line in reversed(lines) if line.startswith(_PARSED)), None)
    if parsed is not None:
        return f"the node {parsed.removeprefix(_PARSED).strip()}, the last one that was parsed"
    last = lines[-1].partition(" ")[2].strip()
    return f"the builder's message {last[:120]!r}, after all nodes were parsed"


def _last_lines(log: Path) -> Iterator[str]:
    if not log.is_file():
        return
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL))
        for line in stream.read().decode(errors="replace").splitlines():
            if line.strip():
                yield line
