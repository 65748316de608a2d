"""The page, from templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.evaluate.ratios import in_words, judge_quality, judge_size, judge_speed
from qdeploy.evaluate.report_page import charts, tables
from qdeploy.evaluate.report_page.content import Content, describe
from qdeploy.evaluate.report_page.images import gallery
from qdeploy.evaluate.thresholds import look_up
from qdeploy.version import __version__

_TEMPLATES = Path(__file__).parent / "templates"
# Timesteps of one layer may be hidden by a few that are equal bit for bit: charts end here.
_MOST_DB = 120.0


def render(content: Content) -> str:
    """The whole page as text. Equal content makes equal bytes.

    Raises:
        InvalidInputError: images were not sampled in the same way.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files = {name: Markup((_TEMPLATES / name).read_text()) for name in ("style.css", "sort.js")}  # noqa: S704 (our own files)
    svgs = {name: Markup(svg) for name, svg in _charts(content).items()}  # noqa: S704 (drawn by us)
    full, samples = content.samples
    return environment.get_template("page.html").render(
        content=content,
        version=__version__,
        style=files["style.css"],
        script=files["sort.js"],
        headlines=_headlines(content),
        failures={name: check["failures"] for name, check in content.checks.items() if check["failures"]},
        conditions=_conditions(content),
        gallery=gallery(full, samples, content.pictures) if full is not None and samples else None,
        charts=svgs,
        ranges={name: svg for name, svg in svgs.items() if name.startswith("ranges of ")},
        recipes=_recipes(content),
        machine=content.speed["machine"] if content.speed else None,
        tables=tables,
        missing=content.missing(),
    )


def _headlines(content: Content) -> list[dict[str, Any]]:
    """The headline figures of each quantized subject."""
    found = []
    baselines = {result["name"]: result for result in content.timed()}
    for subject in content.given.subjects:
        if subject.is_baseline:
            continue
        check, timed = content.checks.get(subject.name), content.time_of(subject)
        figures: list[tuple[str, str]] = []
        verdicts = [judge_quality(check["failures"])] if check else []
        if timed is not None:
            ratios = content.ratios(timed)
            for kind, (ratio, spread) in ratios.items():
                figures.append((in_words(ratio, spread, "×"), f"as fast as {kind}, batch {timed['batch']}"))  # noqa: RUF001
            full = next((r["size_mb"] for name, r in baselines.items() if name.startswith("f32")), None)
            original = f", {full:.1f} in full precision" if full else ""
            verdicts += [judge_speed(kind, *found) for kind, found in list(ratios.items())[-1:]]
            verdicts += [judge_size(timed["size_mb"], full)] if full else []
            figures.append((f"{timed['size_mb']:.1f} MB", f"engine{original}"))
        if check is not None:
            median, psnr = look_up(check, ("quality", "sqnr_db", "median")), check["quality"].get("psnr_db")
            if median is not None:
                figures.append((f"{median:.1f} dB", "SQNR of the prediction, median over timesteps"))
            if isinstance(psnr, int | float):
                figures.append((f"{psnr:.1f} dB", "PSNR of images on the same seeds"))
        found.append(
            {
                "name": subject.name,
                "what": describe(subject),
                "verdicts": verdicts,
                "figures": figures,
            }
        )
    return found


def _conditions(content: Content) -> str:
    """How quality was measured, in a sentence."""
    quality: Mapping[str, Any] = next((check["quality"] for check in content.checks.values()), {})
    if quality.get("source") == "probe":
        return f"Quality is that of {quality['samples']} rows of the probe that is stored in every artifact."
    if not quality.get("samples"):
        return ""
    return (
        f"Quality: {quality['samples']} images of fresh seeds, {quality['inference_steps']} steps of "
        f"{quality.get('scheduler') or 'the model’s own scheduler'}, against full precision on the same seeds."  # noqa: RUF001
    )


def _charts(content: Content) -> dict[str, str]:
    drawn: dict[str, str] = {}
    for metric, what in (("sqnr_db", "SQNR of the prediction, dB"), ("drift", "drift of the trajectory")):
        if series := content.by_timestep(metric):
            drawn[metric] = charts.curves(series, what, metric.replace("_", "-"))
    if content.layers:
        for part in ("own_db", "piled_up_db"):
            by_layer = {
                name: [min(layer[part], _MOST_DB) for layer in errors["layers"]]
                for name, errors in content.layers.items()
            }
            drawn[part] = charts.layers(by_layer, part.replace("_", "-"))
    for index, (name, ranges) in enumerate(content.ranges().items()):
        drawn[f"ranges of {name}"] = charts.heat_map(ranges, f"ranges-{index}")
    return drawn


def _recipes(content: Content) -> dict[str, str]:
    import yaml

    return {
        subject.name: yaml.safe_dump(subject.artifact.recipe, sort_keys=False, width=72)
        for subject in content.given.subjects
        if subject.artifact.recipe
    }
