"""Licences of what ``qdeploy[sd,sign]`` brings, as installed here: ``python tools/licences.py`` prints a table."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

EXTRAS = ("sd", "sign")


def licence(package: Distribution) -> str:
    """The licence that a package's metadata state: an SPDX expression, else classifiers, else free text."""
    stated = package.metadata.get("License-Expression")
    classified = [
        entry.rpartition(" :: ")[2]
        for entry in package.metadata.get_all("Classifier") or []
        if entry.startswith("License :: ")
    ]
    free = (package.metadata.get("License") or "not stated").strip().splitlines()[0]
    return stated or ", ".join(classified) or free


def walk(name: str, extras: tuple[str, ...], found: dict[str, str]) -> None:
    """Add a package and what it needs on this platform."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found and not extras:
        return
    found[key] = licence(package)
    for line in package.requires or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            walk(needed.name, tuple(needed.extras), found)


def main() -> None:
    """Print the table."""
    found: dict[str, str] = {}
    walk("qdeploy", EXTRAS, found)
    print("| package | licence |\n|---|---|")
    for name, words in sorted(found.items()):
        print(f"| {name} | {words} |")


if __name__ == "__main__":
    main()
