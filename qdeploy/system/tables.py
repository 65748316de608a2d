"""One model of a table, shown in the terminal, in Markdown and in the report's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import StringIO

MISSING = "–"  # noqa: RUF001 - a dash, not a minus


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        sort: the number that rows are sorted by; the text if None.
        bar: length of a bar behind the text, from 0 to 1; only the page draws it.
        tone: ``good``, ``bad`` or nothing.
        code: whether the text is a name of the program, such as a layer's path.
    """

    text: str
    sort: float | None = None
    bar: float | None = None
    tone: str = ""
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Attributes:
        columns: the names of the columns.
        rows: a cell, or its text, for each column.
        caption: what the table shows; only the page shows it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""

    @cached_property
    def cells(self) -> list[list[Cell]]:
        """The rows with every text as a cell."""
        return [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows]

    @cached_property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers; the names in the first column never count as such."""
        return [
            index > 0 and any(row[index].sort is not None for row in self.cells)
            for index in range(len(self.columns))
        ]

    def text(self) -> str:
        """The table in plain characters; all columns but the first are aligned to the right."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD, header_style="")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.cells:
            table.add_row(*(cell.text for cell in row))
        # Wide enough for any row: output that goes to a file must not be cut to the width of a terminal.
        stream = StringIO()
        Console(file=stream, width=1000, color_system=None, force_terminal=False, highlight=False).print(
            table
        )
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell.text)}</td>" for cell in row) + "</tr>" for row in self.cells
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        rows = ([cell.text for cell in row] for row in self.cells)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *rows)) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals, or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def amount(value: float | None, digits: int = 1, suffix: str = "", bar: float | None = None) -> Cell:
    """A cell with a number that rows can be sorted by; a dash, which sorts last, if there is none."""
    if value is None:
        return Cell(MISSING)
    return Cell(f"{number(value, digits)}{suffix}", float(value), bar)


def percentage(share: float) -> Cell:
    """A cell with a share from 0 to 1 as a percentage."""
    return Cell(f"{share:.0%}", share)


def verdict(passed: bool | None) -> Cell:
    """A cell that says passed, failed or not checked."""
    text, tone = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not checked", "")}[passed]
    return Cell(text, tone=tone)
