"""The tree of the package as `docs/design.md` shows it: rooms with their purpose, and the files in each.

`python tools/tree.py` writes it anew; a test holds the page to it.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- tree: begin -->\n", "<!-- tree: end -->\n"
WIDTH = 118


def purpose(file: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


def lines(package: Path, depth: int = 0) -> list[str]:
    """A package, what it is for, its files, and its subpackages."""
    indent = "    " + "  " * depth
    shown = [f"{indent}{package.name + '/':<{22 - 2 * depth}}{purpose(package / '__init__.py')}"]
    files = sorted(file.stem for file in package.glob("*.py") if file.stem != "__init__")
    if depth == 0:
        shown += [f"{indent}  {name + '.py':<20}{purpose(package / f'{name}.py')}" for name in files]
    elif files:
        shown += textwrap.wrap(
            " · ".join(files), WIDTH, initial_indent=indent + "  ", subsequent_indent=indent + "  "
        )
    for folder in sorted(file.parent for file in package.glob("*/__init__.py")):
        shown += lines(folder, depth + 1)
    return shown


def tree() -> str:
    """The whole tree as Markdown."""
    return "\n".join(lines(ROOT / "qdeploy")) + "\n"


def written(page: str) -> str:
    """A page with the tree between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tree()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
