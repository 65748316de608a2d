"""The verb ``report``: one self-contained HTML file, from artifacts and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.evaluate.quality import QualityPlan
from qdeploy.evaluate.report_page import measured
from qdeploy.evaluate.report_page.content import Content
from qdeploy.evaluate.report_page.render import render
from qdeploy.evaluate.report_page.sensitivity import read_sensitivity
from qdeploy.evaluate.report_page.subjects import find_reference, open_given
from qdeploy.model.folder import Model
from qdeploy.model.sampling import AS_COLLECTED, Sampling, SamplingOptions, renamed, sampled, with_old_names
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import explained_os_errors, write_text
from qdeploy.system.devices import check_device, own_device
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from typing_extensions import Unpack

Result = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class ReportResult:
    """The page that was written.

    Attributes:
        path: the HTML file.
        passed: whether every check that it shows passed; None if it shows none.
        subjects: names of what it compares.
        missing: what it does not show, and how to add it: a sentence each.
    """

    path: Path
    passed: bool | None
    subjects: list[str]
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy report --json``."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "subjects": self.subjects,
            "missing": self.missing,
            "bytes": self.path.stat().st_size,
        }

    def text(self) -> str:
        """The result for people."""
        verdict = {True: "all checks passed", False: "a check failed", None: "nothing was checked"}[
            self.passed
        ]
        lines = [f"{self.path} ({self.path.stat().st_size / 1e6:.1f} MB): {verdict}"]
        return "\n".join([*lines, *(f"not shown: {line}" for line in self.missing)])


@sampled(AS_COLLECTED)
def report(
    paths: Sequence[str | Path | Artifact],
    output: str | Path = "report.html",
    sampling: Sampling | None = None,
    *,
    reference: str | Path | Model | None = None,
    checks: Sequence[Result] = (),
    benchmark: Result | None = None,
    sensitivity: str | Path | None = None,
    shown: int = 8,
    samples: int = 64,
    speed_batch: Sequence[int] = (1,),
    rounds: int = 30,
    folder: str | Path | None = None,
    device: str = "cpu",
    **options: Unpack[SamplingOptions],
) -> ReportResult:
    """Write one HTML file that holds everything it shows.

    Results that are not passed are measured, and cached next to the file: an interrupted report continues, and
    one that is made again with more artifacts measures only those.

    Args:
        paths: engines, ONNX bundles and checkpoints to compare, all of one model. A checkpoint or bundle that
            another of them was made from is shown with it. Folders that ``sample`` wrote bring the pictures, a
            calibration set brings ranges.
        output: the HTML file.
        sampling: how images are sampled, in checks and pictures; 50 steps of DDIM by default.
        reference: the full-precision model; by default the one at the path that the artifacts note.
        checks: results of ``check --json``, files or objects.
        benchmark: the result of ``benchmark --json``, a file or an object.
        sensitivity: a folder that ``sensitivity`` wrote.
        shown: seeds to show images of; 0 for none.
        samples: images to measure quality on.
        speed_batch: samples per call of an engine to measure speed with.
        rounds: interleaved rounds that speed is measured in.
        folder: where measurements are cached; ``NAME-measured`` next to the file by default.
        device: torch device of the reference, of checkpoints and of pictures.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Raises:
        UsageError: nothing is named that could be compared, missing prompts, or the file cannot be written.
        InvalidInputError: an artifact or a result is damaged, or does not belong to the others.
        CapabilityError: a runtime is not installed, or the device is not there.
    """
    check_device(device)
    output = Path(output)
    if output.is_dir():
        raise UsageError(f"{output} is a folder: name the HTML file to write")
    changes, keep = with_old_names(dict(options), QualityPlan().keep)
    renamed(changes, "pictures", "shown")
    shown = changes.pop("shown", shown)
    if shown < 0:
        raise UsageError(f"the number of seeds that are shown must be at least 0, not {shown}")
    if isinstance(changes.get("batch"), Sequence):
        renamed(changes, "batch", "speed_batch")
        speed_batch = changes.pop("speed_batch")
    plan = QualityPlan((sampling or AS_COLLECTED).changed(changes), samples, keep)
    ranking = None if sensitivity is None else read_sensitivity(sensitivity)
    given = open_given(paths)
    model = find_reference(given, reference)
    plan = replace(plan, sampling=plan.sampling.like(given.sampled))
    if model is not None:
        plan = replace(plan, sampling=with_shipped_prompts(plan.sampling, model.path))
    work = Path(folder) if folder is not None else output.with_name(f"{output.stem}-measured")
    with explained_os_errors(work):
        speed = measured.benchmark_of(
            given, benchmark, model, measured.Turns(tuple(speed_batch), rounds), work
        )
        content = Content(
            given=given,
            model=model,
            checks=measured.checks_of(given, checks, model, plan, work, own_device(device)),
            speed=speed,
            layers=measured.layer_errors_of(given, model, work),
            kernels=measured.kernel_times_of(given, speed, work),
            samples=measured.samples_of(
                given, model, measured.Pictures(shown, plan, own_device(device)), work
            ),
            sensitivity=ranking,
            pictures=shown,
        )
    say(f"writing {output}", level=2)
    page = render(content)
    with explained_os_errors(output):
        write_text(output, page)
    names = [subject.name for subject in given.subjects]
    return ReportResult(output, content.passed, names, content.missing())
