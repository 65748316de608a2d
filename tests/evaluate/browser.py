"""A real browser to open pages in: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser with an empty profile; skips the test where there is none."""
    found = next((place for name in NAMES if (place := shutil.which(name))), None)
    if found is None:
        assert not os.environ.get("QDEPLOY_NEEDS_BROWSER"), "this run was told that there is a browser"
        pytest.skip("needs Chromium: install the system's package, such as `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()
