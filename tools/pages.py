"""Pages of ``docs/`` made from tables and results: ``python tools/pages.py`` writes them, a test holds them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
_MADE = "<!-- python tools/pages.py writes this page -->\n\n"
_TABLE, _END = "<!-- python tools/pages.py writes this table -->", "<!-- to here -->"


class Question(NamedTuple):
    """One results file, and what it answers.

    Attributes:
        title: the question.
        file: the file's name in ``benchmarks/results``.
        report: the module of ``benchmarks`` whose ``table`` is given the file's results; or MODULE:FUNCTION, which is
            given all that the file holds and returns Markdown.
        command: that measured it.
        date: when.
    """

    title: str
    file: str
    report: str
    command: str
    date: str

    def table(self, content: Mapping[str, Any]) -> str:
        """The file's content as Markdown."""
        module, _, function = self.report.partition(":")
        report = import_module(f"benchmarks.{module}")
        made: str = (
            getattr(report, function)(content) if function else report.table(content["results"]).markdown()
        )
        return made


QUESTIONS = {
    name: Question(**fields)
    for name, fields in yaml.safe_load((RESULTS / "questions.yaml").read_text(encoding="utf-8")).items()
}


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    from qdeploy.system.tables import Table

    return Table(head, rows).markdown()


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
    return _with_table(text, QUESTIONS["how-good-are-few-bits"].table(content))


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
