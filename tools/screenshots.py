"""Pictures of what a user sees: the site, the report, and verbs in a terminal of 100 columns.

    make docs
    python tools/screenshots.py -o screenshots --report out/report.html --terminal "qdeploy doctor"

The site and the report are drawn by the system's Chromium on a desk, on a phone and in the dark. What a verb prints
in a terminal becomes an SVG image.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGES = ("", "guides/cpu-server/", "guides/wrong-pictures/", "benchmarks/", "which-preset/", "api/")
SCREENS: dict[str, dict[str, Any]] = {
    "desk": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
COLUMNS = 100


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on the loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def draw(addresses: dict[str, str], output: Path) -> Iterator[str]:
    """Draw pages by name on every screen; yields a sentence for each that is wider than its screen."""
    from tests.evaluate.browser import chromium

    with chromium() as browser:
        for screen, options in SCREENS.items():
            page = browser.new_context(**options).new_page()
            for name, address in addresses.items():
                page.goto(address, wait_until="networkidle")
                page.screenshot(path=str(output / f"{name}-{screen}.png"))
                wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                if wide > 0:
                    yield f"{name} is {wide} pixels wider than the screen ({screen})"


def draw_terminal(line: str, output: Path) -> None:
    """An SVG image of what a command prints in a terminal."""
    from rich.console import Console
    from rich.text import Text

    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        shlex.split(line), capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(f"[bold]$ {line}[/bold]", highlight=False)
        console.print(Text.from_ansi(done.stdout + done.stderr))
    name = re.sub(r"\W+", "-", line.partition(" ")[2]).strip("-")
    console.save_svg(str(output / f"terminal-{name}.svg"), title="qdeploy")


def main() -> None:
    """Draw what is asked for; exit code 1 if a page does not fit its screen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="the built site")
    parser.add_argument("--report", type=Path, help="a report.html")
    parser.add_argument("--terminal", action="append", default=[], help="a command; repeatable")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for line in given.terminal:
        draw_terminal(line, given.output)
    with served(given.site) as root:
        addresses = {f"site-{page.strip('/').replace('/', '-') or 'index'}": root + page for page in PAGES}
        if given.report:
            addresses["report"] = given.report.resolve().as_uri()
        too_wide = list(draw(addresses, given.output))
    print("\n".join(too_wide) or f"{len(addresses) * len(SCREENS)} pictures in {given.output}")
    sys.exit(bool(too_wide))


if __name__ == "__main__":
    main()
