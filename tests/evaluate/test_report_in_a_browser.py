"""The report as people meet it: opened from a file, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from qdeploy.evaluate.report_page.run import ReportResult
from tests.evaluate.browser import chromium

pytestmark = pytest.mark.slow

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# Contrast as WCAG 2.2 defines it, of every element that holds text, against the nearest opaque background.
CONTRASTS = """() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return paint.getImageData(0, 0, 1, 1).data;
  };
  const luminance = ([r, g, b]) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [x, y, z] = [r, g, b].map((v) => linear(v / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("script, style") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(ink), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Any, page: ReportResult) -> Iterator[Any]:
    """The page in a tab of its own, with what it asked for and complained about."""
    tab = browser.new_page(viewport=DESK)
    tab.asked, tab.complaints = [], []
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.goto(page.path.resolve().as_uri())
    yield tab
    tab.close()


def test_it_opens_from_a_file_without_asking_for_anything_else_or_complaining(tab: Any) -> None:
    assert tab.title().endswith("qdeploy report")
    assert {url.partition(":")[0] for url in tab.asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in tab.asked) == 1
    assert tab.complaints == []


def test_all_pictures_are_there(tab: Any) -> None:
    sizes = tab.evaluate(
        "() => Array.from(document.images, (i) => [i.complete, i.naturalWidth, i.naturalHeight, i.alt])"
    )
    assert len(sizes) == 3 * 3  # seeds; full precision, the engine, their difference
    assert all(complete and width > 0 and height > 0 and alt for complete, width, height, alt in sizes)
    lengths = tab.evaluate(
        "() => Array.from(document.querySelectorAll('.chart path'), (path) => path.getTotalLength())"
    )
    drawn = sum(length > 50 for length in lengths)
    assert drawn > 4
    labels = tab.evaluate("() => Array.from(document.querySelectorAll('[role=img]'), (e) => e.ariaLabel)")
    assert len(labels) >= 5
    assert all(labels)


def test_tables_sort_by_a_click_on_the_header(tab: Any) -> None:
    tab.evaluate("() => document.querySelectorAll('details').forEach((d) => d.open = true)")
    table = tab.locator("table", has=tab.locator("caption", has_text="Error by layer of"))
    numbers = """() => {
      const table = [...document.querySelectorAll("table")].find((t) => t.caption.textContent.startsWith("Error by"));
      return Array.from(table.tBodies[0].rows, (row) => Number(row.cells[1].dataset.sort));
    }"""
    before = tab.evaluate(numbers)
    button = table.locator("thead button").nth(1)
    button.click()
    down = tab.evaluate(numbers)
    assert before != down == sorted(before, reverse=True)
    assert table.locator("th[aria-sort=descending]").count() == 1
    button.press("Enter")  # by the keyboard too
    assert tab.evaluate(numbers) == sorted(before)
    table.locator("thead button").nth(0).click()
    assert tab.evaluate(numbers) == before  # names sort by the order of execution


def test_what_has_no_value_sorts_last(tab: Any) -> None:
    table = tab.locator("table", has=tab.locator("caption", has_text="one layer quantized alone"))
    for _ in range(2):
        table.locator("thead button").nth(2).click()  # of its int4 weights
        assert table.locator("tbody tr").last.locator("th").inner_text() == "conv_b"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(tab: Any, scheme: str) -> None:
    tab.set_viewport_size(PHONE)
    tab.emulate_media(color_scheme=scheme)
    tab.evaluate("() => document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert tab.evaluate("() => document.documentElement.scrollWidth") == PHONE["width"]
    tab.evaluate("() => window.scrollTo(500, 0)")
    assert tab.evaluate("() => window.scrollX") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_light_and_on_dark(tab: Any, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.evaluate("() => document.querySelectorAll('details').forEach((d) => d.open = true)")
    paper = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", paper))
    assert (max(red, green, blue) < 60) if scheme == "dark" else (min(red, green, blue) > 200)
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert any(tag == "text" for _, tag, _ in contrasts)  # of charts too
    assert min(contrasts)[0] >= 4.5, min(contrasts)


def test_landmarks_and_headings_lead_through_it(tab: Any) -> None:
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert tab.get_by_role(landmark).count() == 1, landmark
    targets = tab.evaluate(
        "() => Array.from(document.querySelectorAll('nav a'), (a) => !!document.querySelector(a.hash))"
    )
    assert len(targets) >= 8
    assert all(targets)
    ids = tab.evaluate("() => Array.from(document.querySelectorAll('[id]'), (e) => e.id)")
    assert len(ids) == len(set(ids))
