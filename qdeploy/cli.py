"""The command line: ``qdeploy VERB ...``.

Results go to stdout, as text or with ``--json`` as one JSON object; everything else goes to stderr.
What does the work is imported inside the verbs (`qdeploy.commands`), so that ``qdeploy --help`` answers at once.
"""

from __future__ import annotations

import os

import click

from qdeploy.commands.base import Commands
from qdeploy.commands.calibration import calibrate, collect, import_checkpoint, preflight, sensitivity
from qdeploy.commands.deployment import (
    build_engine,
    doctor,
    export,
    export_gguf,
    lint,
    package,
    push,
    selftest,
    sign,
    verify,
)
from qdeploy.commands.evaluation import auto, benchmark, check, demo, report, sample, tune
from qdeploy.commands.information import init, inspect, methods
from qdeploy.commands.models import import_
from qdeploy.commands.scale import sweep, work
from qdeploy.version import __version__

# Read when torch is imported. Threads that spin while they wait slow down each other, by more than ten times
# where other work runs at the same time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qdeploy")
def main() -> None:
    """From a diffusion model to a measured low-bit engine."""


for _command in (
    demo,
    init,
    auto,
    tune,
    import_,
    preflight,
    collect,
    calibrate,
    import_checkpoint,
    sensitivity,
    export,
    export_gguf,
    build_engine,
    push,
    sign,
    verify,
    package,
    sample,
    check,
    sweep,
    work,
    benchmark,
    report,
    lint,
    inspect,
    methods,
    doctor,
    selftest,
):
    main.add_command(_command)

if __name__ == "__main__":
    main()
