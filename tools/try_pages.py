"""Do the pages work for a newcomer? Runs the commands of README and the guides in a new environment.

    python tools/try_pages.py                          # README and all guides
    python tools/try_pages.py docs/guides/rtx.md --keep runs/first-hour
    python tools/try_pages.py --first torch==2.13.0    # the CPU build, where that name gives one

A new virtual environment with what README's install line installs, an empty home folder, and a folder of its own for
each page. ``sd15/`` is a copy of the shipped text-to-image model, `prompts.txt` two of its prompts. A comment
``# exit N`` announces another exit code than 0. Prints each command with its seconds and what it ended with; exit
code 1 if one did not end as its page says.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
LONGEST_S = 3600
PROMPTS = "a red circle\ntwo blue squares\n"


class Command(NamedTuple):
    """A line of a page and the exit code that it announces."""

    line: str
    exit_code: int


def commands(page: Path) -> Iterator[Command]:
    """The commands in a page's console blocks, in their order."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            announced = re.search(r"# exit (\d)", line)
            if bare := line.partition(" #")[0].strip():
                yield Command(bare, int(announced[1]) if announced else 0)


class Newcomer:
    """A machine that has never seen qdeploy: an empty environment and an empty home.

    Args:
        folder: where everything is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)  # noqa: S607
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)

    def run(self, line: str, place: Path) -> tuple[int, float, str]:
        """Run a line of a page: its exit code, its seconds and the end of what it said."""
        kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "LANG", "SSL_"))}
        path = f"{self.folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line.replace("'qdeploy[", f"'{self.clone}[")],  # noqa: S607
            cwd=self.clone if "./tools/" in line else place,
            env=kept | {"HOME": str(self.home), "PATH": path},
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        return done.returncode, time.monotonic() - began, (done.stdout + done.stderr)[-2000:]

    def place_for(self, page: Path) -> Path:
        """A folder for a page, with what its commands take for granted."""
        place = self.folder / page.stem
        place.mkdir()
        if "sd15/" in page.read_text(encoding="utf-8"):
            shutil.copytree(
                next(self.folder.glob("venv/lib/*/site-packages/qdeploy_models/scenes")), place / "sd15"
            )
            (place / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
        return place


def try_page(newcomer: Newcomer, page: Path) -> bool:
    """Run a page's commands, each whatever became of the one before; whether all ended as announced."""
    place, right = newcomer.place_for(page), True
    print(f"\n{page.name}", flush=True)
    for line, announced in commands(page):
        code, seconds, said = newcomer.run(line, place)
        print(f"{seconds:8.1f} s  exit {code}  {line}", flush=True)
        if code != announced:
            right = False
            print(f"announced: exit {announced}; it said:\n{said}", flush=True)
    return right


def main() -> None:
    """Run the pages that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="pages; README and the guides by default")
    parser.add_argument("--first", help="a requirement to install first, such as the CPU build of torch")
    parser.add_argument("--keep", type=Path, help="a new folder to work in, which stays")
    given = parser.parse_args()
    pages = given.pages or [ROOT / "README.md", *sorted(GUIDES.glob("*.md"))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep.resolve() if given.keep else Path(temporary) / "newcomer"
        newcomer = Newcomer(folder)
        install, *_ = (line for line, _ in commands(ROOT / "README.md") if line.startswith("pip install"))
        for line in ([f"pip install --quiet {given.first}"] if given.first else []) + [install]:
            code, seconds, said = newcomer.run(line, folder)
            print(f"{seconds:8.1f} s  exit {code}  {line}", flush=True)
            if code:
                sys.exit(said)
        results = [try_page(newcomer, page) for page in pages]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
