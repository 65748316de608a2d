"""The verb ``sweep``: recipes and seeds, each calibrated and checked as a part, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qdeploy.evaluate.check import check
from qdeploy.evaluate.effective_bits import effective_bits
from qdeploy.evaluate.thresholds import look_up
from qdeploy.model.folder import Model, open_model
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.model.sampling import AS_COLLECTED, Sampling, sampled
from qdeploy.parts.folder import PartFolder, parts_of
from qdeploy.parts.plan import Job, named
from qdeploy.parts.run import check_place
from qdeploy.parts.verb import VerbInParts
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.artifact import Artifact, CalibrationFolder, open_artifact
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.files import explained_os_errors, write_json, write_text
from qdeploy.system.devices import check_device, kind_of, own_device
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_of
from qdeploy.system.tables import MISSING, Table
from qdeploy.version import __version__
from qdeploy.workflows.calibrate import calibrate

RESULTS, TABLE, RESULT = "sweep.json", "table.md", "result.json"
COLUMNS: dict[str, tuple[tuple[str, ...], int]] = {
    "SQNR dB, median": (("quality", "sqnr_db", "median"), 1),
    "worst": (("quality", "sqnr_db", "worst"), 1),
    "PSNR dB": (("quality", "psnr_db"), 1),
    "FD-local": (("quality", "fd_local", "subject"), 2),
    "bits of weights": (("bits", "weights"), 2),
    "of activations": (("bits", "activations"), 2),
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured.

    Attributes:
        path: folder with ``sweep.json`` and ``table.md``.
        request: hash of all that determines it.
        records: ``run`` (the recipe), ``seed``, ``checkpoint`` (its identity), ``parity``, ``quality`` and ``bits``
            of each, recipe by recipe.
    """

    path: Path
    request: str
    records: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As ``sweep.json`` holds it, with its path."""
        return {"path": str(self.path), "request": self.request, "records": list(self.records)}

    def table(self) -> str:
        """A row for each recipe, for people."""
        return self.as_table().text()

    def as_table(self) -> Table:
        """A row for each recipe: means and deviations over seeds."""
        shown = [name for name, (path, _) in COLUMNS.items() if any(_values(self.records, path))]
        rows = []
        for run in dict.fromkeys(record["run"] for record in self.records):
            members = [record for record in self.records if record["run"] == run]
            rows.append([f"{run} ({len(members)})", *(_cell(members, *COLUMNS[name]) for name in shown)])
        return Table(["recipe (seeds)", *shown], rows)


@sampled(AS_COLLECTED)
def sweep(
    model: str | Path,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    recipes: Sequence[str | Path],
    seeds: Sequence[int] = (0, 1, 2),
    effort: str | None = None,
    calibration: str | Path | Artifact | None = None,
    samples: int = 64,
    keep: int = 20,
    device: str = "cpu",
    overwrite: bool = False,
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
    **options: Any,
) -> SweepResult:
    """Calibrate a model by each of some recipes with each of some seeds, and compare all with full precision.

    A sweep that was stopped goes on with the same call, and calibrations that were stopped where they were.

    Args:
        model: a diffusers folder, a zoo model's name or a Hub id.
        output: folder of the results.
        sampling: how images of the comparison are sampled (see `check`).
        recipes: presets' names or YAML files.
        seeds: of calibrations.
        effort: of all calibrations, in place of the recipes' own: ``fast``, ``balanced``, ``thorough`` or ``best``.
        calibration: a calibration set of the model; without one, default sets are collected, one for each seed.
        samples: images to compare.
        keep: denoiser calls of each trajectory at which predictions are compared.
        device: torch device.
        overwrite: replace other results at ``output``.
        on: where parts are made (see `qdeploy.parts.run.made`); a part is one recipe with one seed.
        workers: how many, on Ray.
        worker_cpus: processors for each.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Raises:
        UsageError: no recipe or seed, one of them twice, or something else is at ``output``.
        InvalidInputError: the model, a recipe or the set cannot be used.
        CapabilityError: the device or Ray is not there.
    """
    check_place(on, workers, worker_cpus)
    chosen = (sampling or AS_COLLECTED).changed(options)
    work = _plan(model, output, chosen, recipes, seeds, effort, calibration, samples, keep, device, overwrite)
    return work.carry_out(on, workers, worker_cpus)


def job(**arguments: Any) -> Job:
    """The parts of a call of `sweep`, by its arguments."""
    return _plan(**arguments).job


def _plan(
    model: str | Path,
    output: str | Path,
    sampling: Sampling,
    recipes: Sequence[str | Path],
    seeds: Sequence[int],
    effort: str | None = None,
    calibration: str | Path | Artifact | None = None,
    samples: int = 64,
    keep: int = 20,
    device: str = "cpu",
    overwrite: bool = False,
) -> _Work:
    """Open and check all inputs; nothing large is loaded, and nothing written."""
    for name, values in {"recipe": recipes, "seed": seeds}.items():
        if not values or len(set(map(str, values))) < len(values):
            raise UsageError(f"a sweep takes one {name} or more, each once")
    check_device(device)
    opened = open_model(str(model))
    resolved = {_run_name(recipe): resolve_recipe(recipe, effort=effort) for recipe in recipes}
    if len(resolved) < len(recipes):
        raise UsageError("two recipes of a sweep have the same name: rename one of the files")
    data = None if calibration is None else open_artifact(calibration, CalibrationFolder)
    request = sha256_of(
        {
            "version": __version__,
            "model": opened.sha256,
            "pipeline": pipeline_sha256(opened),
            "recipes": {name: recipe.to_json() for name, recipe in resolved.items()},
            "seeds": list(seeds),
            "calibration": None if data is None else data.sha256,
            "check": [samples, keep, sampling.to_json()],
            "device": kind_of(device),
        }
    )
    arguments = {
        "model": named(model),
        "output": named(Path(output)),
        "sampling": sampling.arguments_json(),
        "recipes": [named(recipe) for recipe in recipes],
        "seeds": list(seeds),
        "effort": effort,
        "calibration": None if data is None else named(data),
        "samples": samples,
        "keep": keep,
        "device": device,
        "overwrite": overwrite,
    }
    return _Work(opened, Path(output), sampling, resolved, data, request, arguments)


@dataclass
class _Work(VerbInParts[SweepResult]):
    """One call of `sweep`."""

    model: Model
    results: Path
    sampling: Sampling
    recipes: Mapping[str, Recipe]
    data: CalibrationFolder | None
    request: str
    arguments: dict[str, Any]

    @property
    def output(self) -> Path:
        """Where the results go."""
        return self.results

    @property
    def place(self) -> Path:
        """The folder of the plan."""
        return parts_of(self.results, self.request)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Recipe and seed of each part."""
        return [(recipe, seed) for recipe in self.recipes for seed in self.arguments["seeds"]]

    @property
    def job(self) -> Job:
        """The parts: one recipe with one seed each."""
        return Job(
            "sweep",
            self.place,
            self.request,
            len(self.runs),
            self.output,
            self.arguments,
            self.make,
            self.arguments["device"],
            "calibrations",
        )

    def make(self, number: int, folder: Path) -> None:
        """Calibrate and check; the calibration's own journal is beside the parts."""
        name, seed = self.runs[number]
        device = own_device(self.arguments["device"])
        place = self.place / "checkpoints" / f"{number:06d}"
        made_here = calibrate(
            self.model.path, place, recipe=self.recipes[name], seed=seed, calibration=self.data, device=device
        )
        counts = {"samples": self.arguments["samples"], "keep": self.arguments["keep"]}
        result = check(
            made_here, self.sampling, reference=self.model.path, min_parity=0, device=device, **counts
        ).to_json()
        record = {
            "run": name,
            "seed": seed,
            "checkpoint": made_here.sha256,
            "parity": result["parity"],
            "quality": result["quality"],
            "bits": effective_bits(made_here),
            "engine_mb": None,
        }
        write_json(folder / RESULT, record)

    def finished(self) -> SweepResult | None:
        """The results of this very request, if they are there.

        Raises:
            UsageError: something else is at the output.
        """
        file = self.output / RESULTS
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        try:
            found = read_json_object(file) if file.is_file() else {}
        except InvalidInputError:
            found = {}
        if found.get("request") == self.request:
            return SweepResult(self.output, self.request, found["records"])
        if found and self.arguments["overwrite"]:
            return None
        what = "holds another sweep" if found else "already exists"
        raise UsageError(f"{self.output} {what}: choose another output")

    def assemble(self, parts: PartFolder) -> SweepResult:
        """Write results and table."""
        records = [read_json_object(files[RESULT]) for files in parts.each(self.make)]
        result = SweepResult(self.output, self.request, records)
        with explained_os_errors(self.output):
            write_text(self.output / TABLE, f"{result.as_table().markdown()}\n")
            write_json(self.output / RESULTS, {"request": self.request, "records": records})
        return result


def _run_name(recipe: str | Path) -> str:
    return Path(recipe).stem if Path(recipe).is_file() else str(recipe)


def _values(records: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> Iterator[float]:
    return (value for record in records if (value := look_up(dict(record), path)) is not None)


def _cell(records: Sequence[Mapping[str, Any]], path: tuple[str, ...], digits: int) -> str:
    values = list(_values(records, path))
    if not values:
        return MISSING
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
