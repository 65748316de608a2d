"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qdeploy.evaluate.ratios import in_words
from qdeploy.evaluate.report_page.content import Content, describe
from qdeploy.evaluate.thresholds import THRESHOLDS, look_up
from qdeploy.mixed.options import ACTIVATIONS, WEIGHTS
from qdeploy.mixed.ranking import LayerHarm, harm_db
from qdeploy.system.tables import MISSING, Cell, Table, amount, number, percentage, verdict


def summary_table(content: Content) -> Table:
    """A row for each subject, and for each baseline that was timed."""
    rows = []
    own = {subject.artifact.sha256: subject for subject in content.given.subjects}
    timed = {result["sha256"]: result for result in content.timed()}
    baselines = [result for sha256, result in timed.items() if sha256 not in own]
    kinds = [*dict.fromkeys(kind for result in timed.values() for kind in content.ratios(result))]
    for result in baselines:
        rows.append(
            [Cell(f"{result['name']} baseline"), Cell(MISSING), *_speed_cells(content, result, kinds)]
        )
        rows[-1] += [Cell(MISSING)] * 4
    for sha256, subject in own.items():
        check = content.checks.get(subject.name)
        quality = check["quality"] if check else {}
        rows.append(
            [
                Cell(subject.name),
                verdict(check["passed"] if check else None),
                *_speed_cells(content, timed.get(sha256), kinds),
                amount(look_up(quality, ("sqnr_db", "median"))),
                amount(look_up(quality, ("sqnr_db", "worst"))),
                amount(
                    look_up(quality, ("psnr_db",))
                    if not isinstance(quality.get("psnr_db"), Mapping)
                    else None
                ),
                amount(check["parity"]["sqnr_db"] if check else None),
            ]
        )
    batch = next((result["batch"] for result in timed.values()), 1)
    speed = [f"ms, batch {batch}", *(f"vs {kind}" for kind in kinds), "MB", "int8 MACs"] if timed else []
    columns = ["", "check", *speed, "SQNR dB", "worst SQNR dB", "PSNR dB", "parity dB"]
    return Table(columns, rows, "Everything in one table")


def _speed_cells(content: Content, result: Mapping[str, Any] | None, kinds: list[str]) -> list[Cell]:
    if not content.timed():
        return []
    if result is None:
        return [Cell(MISSING)] * (3 + len(kinds))
    ratios = content.ratios(result)
    return [
        amount(result["ms"]["median"], 2),
        *(_ratio_cell(ratios.get(kind)) for kind in kinds),
        amount(result["size_mb"]),
        percentage(result["int8_mac_share"]),
    ]


def threshold_table(content: Content) -> Table:
    """The thresholds of each subject, and the measured values."""
    rows = []
    for name, check in content.checks.items():
        for threshold in THRESHOLDS:
            bound = check["thresholds"].get(threshold.name)
            if bound is None:
                continue
            value = look_up(check, threshold.value)
            met = value is not None and (value >= bound if threshold.least else value <= bound)
            demanded = f"{'at least' if threshold.least else 'at most'} {number(bound)}"
            cells = [
                Cell(name),
                Cell(threshold.what),
                amount(value, 2),
                Cell(demanded, float(bound)),
                verdict(met),
            ]
            rows.append(cells)
    columns = ["", "what", "measured", "demanded", "verdict"]
    return Table(columns, rows, "Thresholds of the checks")


def metric_table(content: Content) -> Table:
    """Every number of quality and parity that checks measured, a column for each subject."""
    measured = {
        name: dict([*_numbers("parity", check["parity"]), *_numbers("", check["quality"])])
        for name, check in content.checks.items()
    }
    names = list(dict.fromkeys(metric for values in measured.values() for metric in values))
    rows = [
        [Cell(metric), *(amount(values.get(metric), 3) for values in measured.values())] for metric in names
    ]
    return Table(["", *measured], rows, "Every metric")


_CONDITIONS = {"samples", "inference_steps", "seed"}  # shown below the table


def _numbers(name: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, bool | str | list) or value is None:
        return
    if not isinstance(value, Mapping):
        yield name.replace("_", " ").replace(" db", ", dB"), float(value)
        return
    for key, item in value.items():
        if key not in _CONDITIONS and key != "by_timestep":
            yield from _numbers(f"{name}: {key}" if name else str(key), item)


def layer_table(name: str, errors: Mapping[str, Any]) -> Table:
    """The error of a subject's layers in the order of execution."""
    rows = [
        [
            Cell(layer["name"], place, code=True),
            amount(layer["own_db"], 1),
            amount(layer["piled_up_db"], 1),
        ]
        for place, layer in enumerate(errors["layers"])
    ]
    columns = ["layer", "own error, SQNR dB", "accumulated, SQNR dB"]
    return Table(columns, rows, f"Error by layer of {name}")


def sensitivity_table(layers: Sequence[LayerHarm]) -> Table:
    """Layers by the SQNR that the prediction has with each of them alone quantized, part by part."""
    kinds = [
        (part, name, f"{name} {word}, dB")
        for part, word in ((WEIGHTS, "weights"), (ACTIVATIONS, "input"))
        for name in dict.fromkeys(name for layer in layers for name in layer.best[part])
    ]
    rows = []
    for layer in layers:
        found = (layer.best[part].get(name) for part, name, _ in kinds)
        cells = [amount(None if harm is None else harm_db(harm), 1) for harm in found]
        rows.append([Cell(layer.path, code=True), amount(layer.count, 0), *cells])
    caption = "SQNR of the prediction with one layer quantized alone"
    return Table(["layer", "weights", *(column for _, _, column in kinds)], rows, caption)


def speed_table(content: Content) -> Table:
    """Every engine at every batch size."""
    assert content.speed is not None
    results = content.speed["results"]
    slowest = {
        batch: max(r["ms"]["median"] for r in results if r["batch"] == batch)
        for batch in {result["batch"] for result in results}
    }
    kinds = [*dict.fromkeys(kind for result in results for kind in content.ratios(result))]
    rows = []
    for result in results:
        ratios = content.ratios(result)
        rows.append(
            [
                Cell(result["name"]),
                amount(result["batch"], 0),
                amount(result["ms"]["median"], 3, bar=result["ms"]["median"] / slowest[result["batch"]]),
                amount(result["ms"]["p95"], 3),
                *(_ratio_cell(ratios.get(kind)) for kind in kinds),
                percentage(result["int8_mac_share"]),
            ]
        )
    columns = ["", "batch", "ms", "ms, 95 %", *(f"vs {kind} (quartiles)" for kind in kinds), "int8 MACs"]
    return Table(columns, rows, "Speed against 16 bits and full precision")


def _ratio_cell(found: tuple[float, list[float] | None] | None) -> Cell:
    if found is None:
        return Cell(MISSING)
    return Cell(in_words(*found, "×"), found[0])  # noqa: RUF001


def kernel_table(content: Content) -> Table:
    """Time by type of kernel, a column for each engine."""
    totals = {
        name: sum(kind["ms"] for kind in times["kinds"].values()) or 1.0
        for name, times in content.kernels.items()
    }
    sums: dict[str, float] = {}
    for times in content.kernels.values():
        for kind, entry in times["kinds"].items():
            sums[kind] = sums.get(kind, 0.0) + entry["ms"]
    shown = [kind for kind in sorted(sums, key=lambda kind: -sums[kind]) if sums[kind] > 0]
    rows = []
    for kind in shown:
        cells = [Cell(kind, code=True)]
        for name, times in content.kernels.items():
            entry = times["kinds"].get(kind)
            share = entry["ms"] / totals[name] if entry else None
            cells.append(amount(entry["ms"] if entry else None, 3, bar=share))
        rows.append(cells)
    columns = ["type of kernel", *(f"{name}, ms" for name in content.kernels)]
    return Table(columns, rows, "Time by type of kernel")


def size_table(content: Content) -> Table:
    """What the artifacts take on disk."""
    rows = []
    if content.model is not None:
        megabytes = sum(file.stat().st_size for file in content.model.weights) / 1e6
        rows.append([Cell("full precision"), Cell("weights"), amount(megabytes, 2)])
    for subject in content.given.subjects:
        for artifact in (*subject.before.values(), subject.artifact):
            megabytes = artifact.size() / 1e6
            rows.append([Cell(subject.name), Cell(artifact.kind), amount(megabytes, 2)])
    most = max((row[2].sort or 0.0 for row in rows), default=0.0) or 1.0
    rows = [[*row[:2], Cell(row[2].text, row[2].sort, (row[2].sort or 0.0) / most)] for row in rows]
    return Table(["", "what", "MB"], rows, "Sizes on disk")


def provenance_table(content: Content) -> Table:
    """What each subject was made from and with."""
    rows = []
    for subject in content.given.subjects:
        artifact = subject.artifact
        hashes = {artifact.kind: artifact.sha256, **artifact.made_from}
        for kind, sha256 in hashes.items():
            rows.append([Cell(subject.name), Cell(kind), Cell(str(sha256), code=True)])
        rows.append([Cell(subject.name), Cell("made as"), Cell(describe(subject))])
        rows.append([Cell(subject.name), Cell("qdeploy"), Cell(artifact.manifest.version)])
        rows.append([Cell(subject.name), Cell("seed"), Cell(str(artifact.seed))])
    return Table(["", "what", "value"], rows, "Identities (SHA-256), versions and seeds")
