"""Ratios in words: what is not seen is not claimed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.evaluate.benchmark import BenchmarkResult
from qdeploy.evaluate.ratios import NO_DIFFERENCE, in_words, judge_quality, judge_size, judge_speed


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_a_ratio_is_claimed_only_if_its_quartiles_are_on_one_side_of_1(values: list[float]) -> None:
    low, ratio, high = sorted(values)
    words = in_words(ratio, [low, high])
    assert (NO_DIFFERENCE in words) == (low <= 1 <= high)
    assert f"({low:.2f} to {high:.2f})" in words
    verdict = judge_speed("bf16", ratio, [low, high])
    assert verdict.word == ("warn" if low <= 1 <= high else "pass" if low > 1 else "fail")


def test_a_busy_machine_shows_no_difference() -> None:
    assert in_words(1.05, [0.67, 1.27]) == "no difference seen (0.67 to 1.27)"
    assert in_words(1.76, [1.70, 1.81]) == "1.76x (1.70 to 1.81)"
    assert in_words(1.76, None) == "1.76x"


@pytest.mark.parametrize(("own", "word"), [(3.8, "pass"), (7.6, "warn"), (7.8, "warn"), (9.1, "fail")])
def test_an_engine_that_is_larger_fails(own: float, word: str) -> None:
    assert judge_size(own, 7.7).word == word


def test_quality_fails_with_its_reasons() -> None:
    assert judge_quality([]).word == "pass"
    assert judge_quality(["PSNR is 20 dB"]) == ("quality", "fail", "PSNR is 20 dB")


def test_a_row_of_the_benchmark_says_the_same_as_its_ratio() -> None:
    row = {"name": "e", "backend": "openvino", "precision": "W8A8", "batch": 1, "size_mb": 1.0}
    measured = {"ms": {"median": 16.0, "p95": 17.0}, "int8_mac_share": 1.0}
    result = BenchmarkResult(
        [row | measured], {"e vs bf16": 1.07, "e vs f32": 2.0}, {"e vs bf16": [0.9, 1.2], "e vs f32": [1.9, 2.1]}, {}
    )  # fmt: skip
    shown = result.rows().text()
    assert "2.00x (1.90 to 2.10)" in shown
    assert "no difference seen (0.90 to 1.20)" in shown
    assert "1.07x" not in shown
    assert "<td>2.00x (1.90 to 2.10)</td>" in result._repr_html_()
