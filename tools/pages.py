"""Pages of ``docs/`` made from tables and results: ``python tools/pages.py`` writes them, a test holds them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
_MADE = "<!-- python tools/pages.py writes this page -->\n\n"
_TABLE, _END = "<!-- python tools/pages.py writes this table -->", "<!-- to here -->"


class Question(NamedTuple):
    """One results file, and what it answers.

    Attributes:
        file: its name in ``benchmarks/results``.
        title: the question.
        command: that measured it.
        date: when.
        table: from the file's content to Markdown.
    """

    file: str
    title: str
    command: str
    date: str
    table: Callable[[Mapping[str, Any]], str]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    from qdeploy.system.tables import Table

    return Table(head, rows).markdown()


def _rows(module: str) -> Callable[[Mapping[str, Any]], str]:
    """The table that a report of ``benchmarks`` makes of a file's results."""

    def made(content: Mapping[str, Any]) -> str:
        table: str = import_module(f"benchmarks.{module}").table(content["results"]).markdown()
        return table

    return made


def _methods(content: Mapping[str, Any]) -> str:
    from benchmarks.methods_report import joined, table_of

    return _markdown(*table_of(joined(content["results"])))


def _blocks(content: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['shape']}, {row['weights']}, {row['backend']} {row['precision']}",
            f"{row['cpu_ms']:.2f}",
            f"{row['disk_mb']:.1f}",
            f"{row['memory_mb']:.0f}",
            f"{row['load_seconds']:.2f}",
            f"{row['sqnr_db']:.1f}",
            f"{row['parity_db']:.1f}",
        ]
        for row in content["results"]
    ]
    head = ["engine", "CPU ms a call", "MB on disk", "MB of memory", "s to load", "SQNR dB", "parity dB"]
    return _markdown(head, rows)


def _pipelines(content: Mapping[str, Any]) -> str:
    from benchmarks.pipeline_report import tables

    return tables(content)


def _terrain(content: Mapping[str, Any]) -> str:
    from benchmarks.terrain_report import tables

    return tables(content)


def _cluster(content: Mapping[str, Any]) -> str:
    from benchmarks.cluster_report import tables

    return tables(content)


def _sweep(content: Mapping[str, Any]) -> str:
    from qdeploy.workflows.sweep import SweepResult

    return SweepResult(ROOT, content["request"], content["records"]).as_table().markdown()


def _lost(content: Mapping[str, Any]) -> str:
    from benchmarks.lost_workers_report import table

    return table(content["verbs"]).markdown()


def _builds(content: Mapping[str, Any]) -> str:
    from benchmarks.rtx_builds_report import tables

    return tables(content)


def _large_builds(content: Mapping[str, Any]) -> str:
    from benchmarks.rtx_builds_report import large

    return large(content)


QUESTIONS = {
    "from-prompt-to-png-on-scenes": Question(
        "pipeline-scenes.json",
        "From prompt to PNG on scenes: who is fastest, and how near to full precision?",
        "python -m benchmarks.pipeline --shape scenes --steps 4 20 50 --rounds 6 --without compiled",
        "2026-11-29",
        _pipelines,
    ),
    "from-prompt-to-png-in-the-shape-of-stable-diffusion": Question(
        "pipeline-sd217.json",
        "From prompt to PNG in the shape of Stable Diffusion: who is fastest?",
        "python -m benchmarks.pipeline --shape sd217 --steps 4 20 --rounds 4 --one-at-a-time --without compiled",
        "2026-11-29",
        _pipelines,
    ),
    "how-good-are-the-methods-on-digits": Question(
        "digits.json",
        "How good are the methods on digits?",
        "python -m benchmarks.methods --threads 1 --groups 1",
        "2026-11-30",
        _methods,
    ),
    "how-good-are-the-methods-on-scenes": Question(
        "scenes.json",
        "How good are the methods on scenes?",
        "python -m benchmarks.methods --model scenes --samples 64 --threads 1 --groups 1",
        "2026-11-30",
        _methods,
    ),
    "what-breaks-w8a8-on-terrain": Question(
        "terrain.json",
        "What breaks W8A8 on terrain, a network of others, and what mends it?",
        "python -m benchmarks.terrain --folder runs/terrain --why",
        "2026-11-29",
        _terrain,
    ),
    "what-the-papers-claim-over-several-calibrations": Question(
        "verdicts.json",
        "What the papers claim, over several calibrations",
        "python -m benchmarks.verdicts --model digits",
        "2026-11-29",
        _rows("verdicts_report"),
    ),
    "held-against-the-authors-code": Question(
        "oracles.json",
        "Held against the authors' own code",
        "python -m benchmarks.oracles.run qdiffusion --checkout q-diffusion --seeds 0 1 2",
        "2026-11-29",
        _rows("oracles.report"),
    ),
    "roundings-quality-against-time": Question(
        "roundings.json",
        "Roundings: quality against time",
        "python -m benchmarks.roundings --model digits",
        "2026-11-29",
        _rows("roundings_report"),
    ),
    "how-good-are-few-bits": Question(
        "four-bits.json",
        "How good are few bits: W8A8, W4A8, blocks and W4A4 over three calibrations?",
        "python -m benchmarks.four_bits",
        "2026-11-29",
        _rows("four_bits_report"),
    ),
    "how-fast-are-products-in-blocks": Question(
        "block-products.json",
        "How fast are products in blocks, by precision and by group of activations?",
        "python -m benchmarks.block_products",
        "2026-11-29",
        _rows("block_products_report"),
    ),
    "what-do-rotations-and-branches-cost": Question(
        "branch-cost.json",
        "What do rotations and low-rank branches cost in a call?",
        "python -m benchmarks.branch_cost",
        "2026-11-29",
        _rows("branch_cost_report"),
    ),
    "what-do-weights-in-blocks-give": Question(
        "blocks-digits-dit.json",
        "What do weights in blocks give on a CPU?",
        "python -m benchmarks.blocks --shape digits-dit",
        "2026-11-28",
        _blocks,
    ),
    "weights-in-blocks-of-small-and-large-models": Question(
        "blocks.json",
        "Weights in blocks of small and large models, on a processor without AMX",
        "python -m benchmarks.blocks --shape digits-dit --shape scenes --shape pixart-xl --calls 7",
        "2026-11-30",
        _blocks,
    ),
    "graphs-of-other-quantizers-by-our-lint": Question(
        "lint-others.json",
        "Graphs of other quantizers: what do our lint and NVIDIA's builder make of them?",
        "python -m benchmarks.lint_others --build sm89 -o benchmarks/results/lint-others.json",
        "2026-11-30",
        _rows("lint_others_report"),
    ),
    "what-does-a-cluster-take": Question(
        "cluster-model.json",
        "What does a cluster take for 50,000 images, and what does a fleet serve?",
        "python -m benchmarks.cluster_model measure --samples 2048 -o times.json",
        "2026-11-30",
        _cluster,
    ),
    "methods-and-seeds-in-one-sweep": Question(
        "sweep-digits.json",
        "Methods and seeds in one sweep",
        "qdeploy sweep digits -o sweep --effort fast -r w4a8-minmax -r w4a8-gptq -r w4a8-tfmq",
        "2026-11-30",
        _sweep,
    ),
    "workers-that-are-lost": Question(
        "lost-workers.json",
        "Workers that are lost: is the result that of one process?",
        "python -m benchmarks.lost_workers --times 10",
        "2026-11-30",
        _lost,
    ),
    "what-does-tensorrt-rtx-make-of-the-graphs": Question(
        "rtx-builds.json",
        "What does TensorRT for RTX make of the graphs?",
        "python benchmarks/rtx_builds.py onnx-digits-* --gpu sm86,sm89,sm120",
        "2026-11-28",
        _builds,
    ),
    "what-do-engines-of-large-networks-move": Question(
        "rtx-builds-large.json",
        "What do engines of large networks move, and what do their builds take?",
        "python -m benchmarks.rtx_builds sdxl-f32 --builds 1 --gpu sm89 -o benchmarks/results/rtx-builds-large.json",
        "2026-11-30",
        _large_builds,
    ),
}


def question_page(question: Question) -> str:
    """The page of one results file, with its command, machine and date, and what the file beside it says of it."""
    content = json.loads((RESULTS / question.file).read_text(encoding="utf-8"))
    machine = content.get("machine")
    where = (
        f"{machine['cpu']}, {machine['cores']} core{'s' * (machine['cores'] > 1)}, {', '.join(machine['features'])}"
        if machine
        else ""
    )
    library = content.get("library")
    facts = [
        f"- command: `{question.command}`",
        f"- machine: {where}" if where else f"- {library}, batch {content['batch']}; built without a GPU",
        f"- measured: {question.date}; file: `benchmarks/results/{question.file}`",
        *([f"- {content['note']}"] if "note" in content else []),
    ]
    findings = (RESULTS / question.file).with_suffix(".md")
    rest = ["", findings.read_text(encoding="utf-8").rstrip()] if findings.is_file() else []
    return "\n".join([_MADE + f"# {question.title}\n", *facts, "", question.table(content), *rest])


def which_page() -> str:
    """The table of presets."""
    from qdeploy.recipe.which import choices

    rows = [
        [
            f"`{choice.preset}`{''.join(f' `{flag}`' for flag in [' '.join(choice.options)] if flag)}",
            ", ".join(choice.models),
            ", ".join(choice.processors),
            ", ".join(choice.wishes),
            choice.why,
            choice.evidence,
        ]
        for choice in choices()
    ]
    head = ["preset", "model", "processor", "wish", "what it gives", "evidence"]
    table = _markdown(head, rows).replace("---:", "---")
    return (
        f"{_MADE}# Which preset\n\n"
        "`cpu` is a processor with VNNI or AMX, `avx2` one without; `tensorrt` a GPU of a server or\n"
        "workstation, `rtx` a GeForce or RTX card. The first row that fits is recommended. The same in a terminal,\n"
        "and a recipe to edit:\n\n"
        '```console\nqdeploy methods --which "dit cpu 4-bit"\nqdeploy init digits-dit --for cpu --wish 4-bit\n```\n\n'
        f"{table}\n"
        "Means over calibrations, from [digits](benchmarks/how-good-are-the-methods-on-digits.md),\n"
        "[scenes](benchmarks/how-good-are-the-methods-on-scenes.md),\n"
        "[few bits](benchmarks/how-good-are-few-bits.md) and\n"
        "[blocks](benchmarks/what-do-weights-in-blocks-give.md).\n"
        "Processors and models differ: `qdeploy auto` measures on yours.\n"
    )


def api_page() -> str:
    """An entry for every public name."""
    import qdeploy
    from qdeploy import _HOMES

    names = [name for name in qdeploy.__all__ if name in _HOMES]
    functions = [name for name in names if name[0].islower()]
    classes = [name for name in names if name[0].isupper()]
    entries = {
        title: "\n\n".join(f"::: {_HOMES[name]}.{name}" for name in listed)
        for title, listed in (("Functions", functions), ("Classes", classes))
    }
    return (
        f"{_MADE}# Python\n\nAll names are those of `qdeploy`: `qdeploy.collect`, `qdeploy.Recipe`, ...\n"
        f"They are imported when they are first used.\n\n{entries['Functions']}\n\n{entries['Classes']}\n"
    )


def benchmark_index(text: str) -> str:
    """The index of benchmarks, with what results files hold at its end."""
    start = text.split("\n## From results files")[0].rstrip()
    listed = "\n".join(f"- [{each.title}]({name}.md)" for name, each in QUESTIONS.items())
    return f"{start}\n\n## From results files\n\n{listed}\n"


def readme(text: str) -> str:
    """The README with its table of pipelines, from their results file."""
    from benchmarks.pipeline_report import headline

    return _with_table(
        text, headline(json.loads((RESULTS / "pipeline-sd217.json").read_text(encoding="utf-8")))
    )


def four_bits(text: str) -> str:
    """The page about four bits with its table, from the results file."""
    content = json.loads((RESULTS / "four-bits.json").read_text(encoding="utf-8"))
    return _with_table(text, _rows("four_bits_report")(content))


def _with_table(text: str, table: str) -> str:
    """A page with another table between its marks."""
    before, _, rest = text.partition(_TABLE)
    return f"{before}{_TABLE}\n{table}{_END}{rest.partition(_END)[2]}"


def pages() -> dict[Path, str]:
    """Every page that is made, by its file."""
    index = DOCS / "benchmarks" / "index.md"
    made = {DOCS / "benchmarks" / f"{name}.md": question_page(each) for name, each in QUESTIONS.items()}
    return {
        **made,
        DOCS / "which-preset.md": which_page(),
        DOCS / "api.md": api_page(),
        index: benchmark_index(index.read_text(encoding="utf-8")),
        DOCS / "four-bits.md": four_bits((DOCS / "four-bits.md").read_text(encoding="utf-8")),
        ROOT / "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
