"""Tables that people can read."""

from __future__ import annotations

from qdeploy.system.tables import MISSING, markdown_table, number, text_table


def test_numbers_that_are_missing_are_dashes() -> None:
    assert number(None) == MISSING
    assert number(1.005, 1) == "1.0"


def test_a_text_table_is_not_cut_and_has_no_colours() -> None:
    name = "a-long-name" * 30
    table = text_table(["engine", "ms"], [[name, "1.50"], ["b", "12.25"]])
    assert name in table
    assert "\x1b" not in table
    lines = table.splitlines()
    assert lines[-1].endswith("12.25")
    assert lines[-1].index("12.25") == lines[-2].index("1.50") - 1


def test_a_markdown_table_has_a_rule() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
