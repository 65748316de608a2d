"""The process that calls the builder: ``python -m qdeploy.engines.tensorrt.worker REQUEST``.

The library can crash, hang or take all memory; here that ends this process alone. The request is a JSON file, and
the answer is another one in the same folder. Every message of the builder goes to a log at once, so that the log of
a crash ends where the crash was. The parent holds the other end of standard input: when it closes, the parent has
ended, and this process ends too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.flavour import FLAVOURS
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.layer_log import is_layer_list
from qdeploy.engines.tensorrt.logger import logger_of
from qdeploy.engines.tensorrt.options import Options
from qdeploy.engines.tensorrt.profiles import parse_shapes
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.system.errors import QDeployError
from qdeploy.system.gpu import Gpu
from qdeploy.system.memory import peak_memory
from qdeploy.system.progress import verbosity

ANSWER, LOG, PLAN = "answer.json", "build.log", "model.plan"


@dataclass(frozen=True)
class BuildRequest:
    """What a worker is asked for.

    Attributes:
        backend: the library, a name of `FLAVOURS`.
        source: the graph as it was exported, for its inputs and outputs.
        graph: the graph in the types to compute in.
        profiles: see `qdeploy.engines.tensorrt.profiles.describe`.
        options: the build's options.
        targets: compute capabilities to compile for.
        gpu: the GPU of this machine, if any.
    """

    backend: str
    source: Path
    graph: Path
    profiles: str
    options: Options
    targets: tuple[int, ...]
    gpu: Gpu | None

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        cache = self.options.timing_cache
        return {
            "backend": self.backend,
            "source": str(self.source),
            "graph": str(self.graph),
            "profiles": self.profiles,
            "options": self.options.facts() | {"timing_cache": None if cache is None else str(cache)},
            "targets": list(self.targets),
            "gpu": None if self.gpu is None else vars(self.gpu),
            "verbosity": verbosity.level,
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> BuildRequest:
        """From the file."""
        options, gpu = content["options"], content["gpu"]
        cache = options.pop("timing_cache")
        return BuildRequest(
            content["backend"],
            Path(content["source"]),
            Path(content["graph"]),
            content["profiles"],
            Options(**options, timing_cache=None if cache is None else Path(cache)),
            tuple(content["targets"]),
            None if gpu is None else Gpu(**{**gpu, "capability": tuple(gpu["capability"])}),
        )


def serve(request: BuildRequest, folder: Path) -> dict[str, Any]:
    """Build into a folder: the plan and the log.

    Returns:
        The answer: ``layers``, the builder's list of layers if it logged one; or ``error`` and ``message``.
    """
    from qdeploy.engines.tensorrt.builder import build_plan

    layers: str | None = None
    trt = load_tensorrt(FLAVOURS[request.backend])
    logger = logger_of(trt)
    with (folder / LOG).open("w", encoding="utf-8", errors="replace") as log:

        def listen(severity: str, message: str) -> None:
            nonlocal layers
            log.write(f"{severity} {message}\n")
            log.flush()
            if is_layer_list(message):
                layers = message

        logger.listeners.append(listen)
        try:
            profiles = parse_shapes(request.profiles) if request.profiles else []
            plan = build_plan(
                trt,
                request.graph,
                read_graph(request.source, refuse=False),
                profiles,
                request.options,
                request.gpu,
                request.targets,
            )
            with (folder / PLAN).open("wb") as stream:
                stream.write(memoryview(plan))
        except QDeployError as error:
            return {"error": type(error).__name__, "message": str(error)}
        finally:
            logger.listeners.remove(listen)
    return {"layers": layers}


def end_with_parent() -> None:
    """Let a thread wait for the end of standard input, and end this process then."""
    waiting = threading.Event()
    threading.Thread(target=_wait_for_parent, args=(waiting,), daemon=True).start()
    waiting.wait()


def _wait_for_parent(waiting: threading.Event) -> None:
    waiting.set()
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    end_with_parent()
    file = Path(sys.argv[1])
    content = json.loads(file.read_text())
    verbosity.level = content.pop("verbosity")
    answer = serve(BuildRequest.from_json(content), file.parent) | {"peak_bytes": peak_memory()}
    (file.parent / ANSWER).write_text(json.dumps(answer))
