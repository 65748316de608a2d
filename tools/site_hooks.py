"""What the site has besides ``docs/``: README's neighbours as pages, and links to files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md", "contributing.md": "CONTRIBUTING.md"}
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the repository's root."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to pages of the root go to their copies; the name alone is left of links to other files."""
    depth = page.file.src_uri.count("/")
    root_pages = {source: page for page, source in PAGES.items()}
    # Where the page's file lies: pages of the root are linked from there.
    folder = ROOT if page.file.src_uri in PAGES else (ROOT / "docs" / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        place = (folder / target).resolve()
        if not place.is_relative_to(ROOT):
            return found[0]
        inside = place.relative_to(ROOT).as_posix()
        if inside in root_pages:
            return f"]({'../' * depth}{root_pages[inside]}{anchor})"
        if inside.startswith("docs/"):
            kept = inside.removeprefix("docs/")
            return f"]({'../' * depth}{kept}{anchor})"
        return f"](#{FILE})" if place.exists() else found[0]

    linked = _LINK.sub(link, markdown)
    return re.sub(rf"\[([^\]]*)\]\(#{FILE}\)", r"\1", linked)


FILE = "a-file-of-the-repository"
