"""Tables that people can read."""

from __future__ import annotations

from qdeploy.system.tables import MISSING, Cell, Table, amount, number


def test_numbers_that_are_missing_are_dashes() -> None:
    assert number(None) == MISSING
    assert number(1.005, 1) == "1.0"


def test_a_text_table_is_not_cut_and_has_no_colours() -> None:
    name = "a-long-name" * 30
    table = Table(["engine", "ms"], [[name, "1.50"], ["b", "12.25"]]).text()
    assert name in table
    assert "\x1b" not in table
    lines = table.splitlines()
    assert lines[-1].endswith("12.25")
    assert lines[-1].index("12.25") == lines[-2].index("1.50") - 1


def test_a_markdown_table_has_a_rule() -> None:
    assert Table(["a", "b"], [["x", "1"]]).markdown() == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_columns_with_amounts_are_numeric_and_missing_amounts_sort_last() -> None:
    table = Table(["layer", "dB", "why"], [[Cell("a", 3.0), amount(1.5), "x"], ["b", amount(None), "y"]])
    assert table.numeric == [False, True, False]
    assert [row[1].sort for row in table.cells] == [1.5, None]
    assert table.markdown().splitlines()[-1] == f"| b | {MISSING} | y |"
