"""The examples run as they stand, each in an empty folder."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.models.published import published
from tests.plugins import install

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md") if path.parent.name != "cluster")
MADE = {
    "stock_pipeline": "circle.png",
    "own_method": "wide-1.2",
    "mixed_precision": "mixed/budget.json",
    "published_checkpoint": "engine/qdeploy.json",
    "controlnet": "images/grid.png",
    "rtx": "engine/qdeploy.json",
    "triton": "models/pipeline/digits/config.pbtxt",
    "sweep": "sweep/table.md",
    "notebook": "images/grid.png",
}


def run(name: str, *arguments: object) -> None:
    """Run the script, or the cells of the notebook, in this process."""
    folder = EXAMPLES / name
    if (folder / "run.py").exists():
        sys.argv = ["run.py", *map(str, arguments)]
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
        return
    (notebook,) = folder.glob("*.ipynb")
    namespace: dict[str, object] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)


def test_every_example_says_what_it_is_in_five_lines() -> None:
    assert set(NAMES) == set(MADE)
    for name in NAMES:
        lines = [line for line in (EXAMPLES / name / "README.md").read_text().splitlines() if line]
        assert len(lines) == 5, name
        assert f"]({name})" in (EXAMPLES / "README.md").read_text()


def test_notebooks_hold_no_outputs() -> None:
    for notebook in EXAMPLES.glob("*/*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name: str, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "rtx" and find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    arguments: tuple[object, ...] = ()
    if name == "published_checkpoint":
        file = published(ddpm, "qdiffusion").save(tmp_path / "file.pth", "qdiffusion")
        arguments = (file, "qdiffusion", ddpm)
    if name == "own_method":
        source = (EXAMPLES / name / "my_methods" / "wide_ranges.py").read_text()
        entry = {"qdeploy.methods": {"wide-ranges": "my_methods.wide_ranges"}}
        install(tmp_path / "site", monkeypatch, entry, name="my_methods", wide_ranges=source)
    run(name, *arguments)
    assert (tmp_path / MADE[name]).exists()
