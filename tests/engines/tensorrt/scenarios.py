"""Our runtime, executed through the real bindings over a recording library.

Run as a program, because mistakes at this border end processes: it prints which scenes failed, and how many native
calls were recorded. A scene is a function whose name begins with ``scene``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from qdeploy.system.progress import verbosity
from tests.engines.tensorrt import scenes_of_running
from tests.engines.tensorrt.stage import library, scratch


def main() -> None:
    verbosity.level = 0
    failed: dict[str, str] = {}
    recorded = 0
    scenes = {name: scene for name, scene in vars(scenes_of_running).items() if name.startswith("scene_")}
    for name, scene in scenes.items():
        print("running", name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            scratch.path = Path(folder)
            try:
                scene()
            except (Exception, pytest.fail.Exception) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                failed[name] = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
        recorded += len(library.journal)
    print(json.dumps({"scenes": list(scenes), "failed": failed, "recorded": recorded}))


if __name__ == "__main__":
    main()
