"""What a report shows is what was measured, and nothing else."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image

from qdeploy.engines.base import Kernel
from qdeploy.evaluate.ratios import in_words
from qdeploy.evaluate.report_page.images import gallery
from qdeploy.evaluate.report_page.kernel_times import by_kind
from qdeploy.evaluate.report_page.layer_errors import layer_errors
from qdeploy.evaluate.report_page.run import ReportResult, report
from qdeploy.evaluate.report_page.sensitivity import read_sensitivity
from qdeploy.evaluate.report_page.subjects import open_given
from qdeploy.evaluate.report_page.tables import sensitivity_table
from qdeploy.model.folder import open_model
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import quantized_layers
from qdeploy.sampling.sample import sample
from qdeploy.store.probe import read_probe
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.tables import MISSING
from tests.evaluate.conftest import Way
from tests.helpers import sqnr_db

pytestmark = pytest.mark.slow


class Tags(HTMLParser):
    """Every attribute of a page that could make a browser fetch something, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data") and value:
                self.fetched.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(result: ReportResult) -> Tags:
    tags = Tags()
    tags.feed(result.path.read_text())
    return tags


def measured(page: ReportResult, name: str) -> dict[str, object]:
    stored = json.loads((page.path.with_name("report-measured") / name).read_text())
    return dict(stored["value"])


def test_nothing_in_it_lies_elsewhere(page: ReportResult) -> None:
    tags = read(page)
    assert tags.fetched
    assert all(target.startswith(("data:", "#")) for target in tags.fetched)
    assert not re.search(r"@import|url\((?!#)", page.path.read_text())


def test_it_shows_what_was_measured(page: ReportResult, way: Way) -> None:
    text = read(page).text
    check = measured(page, "check-0.json")
    assert page.passed is check["passed"]
    assert f"{check['quality']['sqnr_db']['median']:.1f}" in text  # type: ignore[index]
    assert f"{check['parity']['sqnr_db']:.2f}" in text  # type: ignore[index]
    for artifact in (way.checkpoint, way.onnx, way.engine):
        assert artifact.sha256 in text
    speed, pair = measured(page, "benchmark.json"), "w8a8-engine vs f32, batch 2"
    assert in_words(speed["ratios"][pair], speed["ratios_quartiles"][pair], "×") in text  # type: ignore[index]  # noqa: RUF001
    assert page.missing == []


def test_made_again_it_measures_nothing_and_is_the_same(
    page: ReportResult, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was measured before")

    for name in ("check.check", "benchmark.benchmark", "report_page.measured.layer_errors"):
        monkeypatch.setattr(f"qdeploy.evaluate.{name}", refuse)
    before = page.path.read_bytes()
    again = report(
        [way.checkpoint, way.onnx, way.engine],
        page.path,
        reference=way.model,
        sensitivity=page.path.parent,
        shown=3,
        samples=4,
        steps=5,
        speed_batch=(1, 2),
        rounds=3,
    )
    assert again.path.read_bytes() == before


def test_results_that_are_given_are_not_measured(page: ReportResult, way: Way, tmp_path: Path) -> None:
    folder = page.path.with_name("report-measured")
    check, speed = measured(page, "check-0.json"), measured(page, "benchmark.json")
    check["passed"], check["failures"] = False, ["the <median> is too low"]
    result = report(
        [way.engine], tmp_path / "r.html", checks=[check], benchmark=folder / "benchmark.json", shown=0
    )
    assert result.passed is False
    assert "&lt;median&gt;" in result.path.read_text()
    assert "the <median> is too low" in read(result).text
    assert not (tmp_path / "r-measured" / "check-0.json").exists()
    assert any("checkpoint" in line for line in result.missing)
    foreign = {**check, "sha256": "0" * 64}
    with pytest.raises(InvalidInputError, match="not a result of `qdeploy check"):
        report([way.engine], tmp_path / "r.html", checks=[foreign], benchmark=speed, shown=0)
    with pytest.raises(InvalidInputError, match="not a result of `qdeploy benchmark"):
        report([way.engine], tmp_path / "r.html", checks=[check], benchmark=check, shown=0)


def test_without_the_model_it_tells_the_probe_and_what_is_missing(way: Way, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    way.model.rename(moved)
    try:
        result = report([way.engine], tmp_path / "r.html")
    finally:
        moved.rename(way.model)
    assert "rows of the probe" in read(result).text
    assert any("--reference" in line for line in result.missing)


def test_a_way_is_one_subject_and_strangers_are_refused(way: Way, tmp_path: Path) -> None:
    (subject,) = open_given([way.checkpoint, way.engine, way.onnx, way.engine]).subjects
    assert subject.artifact.sha256 == way.engine.sha256
    assert subject.checkpoint is not None
    assert subject.checkpoint.sha256 == way.checkpoint.sha256
    with pytest.raises(UsageError, match="at least one engine"):
        report([], tmp_path / "r.html")
    with pytest.raises(InvalidInputError, match="not a qdeploy artifact"):
        report([way.model], tmp_path / "r.html")
    with pytest.raises(UsageError, match="is a folder"):
        report([way.engine], tmp_path)


def test_the_error_of_each_layer_is_that_of_its_output(way: Way) -> None:
    """The first layer reads the network's input: nothing has piled up there, and it can be computed by hand."""
    model = open_model(way.model)
    told = layer_errors(way.checkpoint, model, rows=1)
    student, teacher = load_checkpoint(way.checkpoint), model.load()
    inputs, _, _ = read_probe(way.checkpoint.path)
    outputs: dict[str, list[torch.Tensor]] = {}
    for network in (teacher, student):
        for name in quantized_layers(student):
            network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: outputs.setdefault(name, []).append(output)
            )
    row = {name: x[:1] for name, x in inputs.items()}
    with torch.no_grad():
        teacher(row["sample"], row["timestep"])
        student(row["sample"], row["timestep"])
    assert {layer["name"] for layer in told["layers"]} == set(outputs)
    for layer in told["layers"]:
        expected, got = outputs[layer["name"]]
        assert layer["piled_up_db"] == pytest.approx(sqnr_db(expected, got), abs=0.01)
    first = told["layers"][0]
    assert first["own_db"] == pytest.approx(
        first["piled_up_db"], abs=0.01
    )  # what it reads is not quantized before
    assert any(abs(layer["own_db"] - layer["piled_up_db"]) > 0.1 for layer in told["layers"])


def decode(uri: str) -> torch.Tensor:
    image = Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1)


def test_pictures_are_the_samples_and_differences_theirs(way: Way, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options = {"samples": 2, "steps": 3, "scheduler": "ddim"}
    full = sample(way.model, tmp_path / "full", **options)
    own = sample(way.engine, tmp_path / "own", **options)
    shown = gallery(full, {"own": own}, 5)
    one, two = (load_file(made.file("images.safetensors"))["images"] for made in (full, own))
    assert [seed["seed"] for seed in shown["seeds"]] == [0, 1]
    for index, seed in enumerate(shown["seeds"]):
        first, second, difference = (decode(tile["uri"]) for tile in seed["tiles"])
        assert torch.equal(first, one[index])
        assert torch.equal(second, two[index])
        expected = ((one[index].int() - two[index].int()).abs() * shown["amplified"]).clamp(max=255)
        assert torch.equal(difference.int(), expected)
    other = sample(way.engine, tmp_path / "other", **options, seed=7)
    with pytest.raises(InvalidInputError, match="seed is 7, not 0"):
        gallery(full, {"own": other}, 5)


def test_large_pictures_are_made_smaller(way: Way, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = sample(way.model, tmp_path / "full", samples=1, steps=1, scheduler="ddim")
    save_file({"images": torch.zeros(1, 3, 600, 300, dtype=torch.uint8)}, made.file("images.safetensors"))
    (tile, *_) = gallery(made, {"same": made}, 1)["seeds"][0]["tiles"]
    assert (tile["width"], tile["height"]) == (128, 256)
    assert tile["uri"].startswith("data:image/webp")


def test_kernels_are_summed_by_type() -> None:
    conv = Kernel("a", ("a",), "Convolution", "int8", "brgconv", 2.0)
    kernels = [conv, replace(conv, precision="f32", ms=1.5), Kernel("b", (), "Reorder", "f32", "jit", 5.0)]
    kernels.append(replace(conv, ms=None))
    assert by_kind(kernels) == {
        "Reorder": {"kernels": 1, "ms": 5.0, "int8_ms": 0.0},
        "Convolution": {"kernels": 2, "ms": 3.5, "int8_ms": 2.0},
    }


def test_rankings_are_read_as_they_stand_and_junk_is_refused(tmp_path: Path, page: ReportResult) -> None:
    layers = read_sensitivity(page.path.parent)
    assert [layer.path for layer in layers] == ["conv_a", "conv_b"]
    table = sensitivity_table(layers)
    assert table.columns == ["layer", "weights", "int4 weights, dB", "int8 weights, dB", "int8 input, dB"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["conv_a", "72", "20.0", "40.0", "30.0"],
        ["conv_b", "72", MISSING, "50.0", MISSING],
    ]
    file = tmp_path / "sensitivity.json"
    for junk in ('{"layers": 3}', '{"layers": [{"path": "a"}]}', "[]", "{"):
        file.write_text(junk)
        with pytest.raises(InvalidInputError):
            read_sensitivity(file)


def test_the_command_line_says_where_it_is(
    qdeploy: Callable[..., Result], way: Way, page: ReportResult, tmp_path: Path
) -> None:
    folder = page.path.with_name("report-measured")
    check = tmp_path / "check.json"
    check.write_text(json.dumps(measured(page, "check-0.json")))
    done = qdeploy(
        "report", way.engine.path, "-o", tmp_path / "r.html", "--check", check, "--benchmark",
        folder / "benchmark.json", "--shown", 0, "--json", "-q",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["subjects"] == ["w8a8-engine"]
    assert told["bytes"] == (tmp_path / "r.html").stat().st_size
