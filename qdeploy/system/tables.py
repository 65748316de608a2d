"""Tables for people, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

MISSING = "–"  # noqa: RUF001 - a dash, not a minus


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals, or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """A table of plain characters; the first column is text, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", header_style="")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wide enough for any row: what is piped into a file shall not be cut to the width of some terminal.
    stream = StringIO()
    Console(file=stream, width=1000, color_system=None, force_terminal=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)) + "\n"
