"""What we export ourselves: clean for TensorRT by construction, and what fires elsewhere is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from torch import nn

from qdeploy.calibration_set.collect import collect
from qdeploy.export.lint.rule import rules
from qdeploy.export.lint.run import graph_file, lint
from qdeploy.export.lint.table import in_step
from qdeploy.export.lint.waivers import WAIVERS
from qdeploy.export.macs import graph_macs, meant_int8
from qdeploy.export.run import export
from qdeploy.network.roles import Layer
from qdeploy.quant.insert import too_thin
from qdeploy.recipe.kernel_limits import CHANNELS
from qdeploy.store.artifact import Artifact
from qdeploy.workflows.calibrate import calibrate
from tests.export.lint.fixtures import CASES, good

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def bundles(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The tiny pipeline, whose first block has 8 channels, calibrated for both targets."""
    folder = tmp_path_factory.mktemp("lint")
    data = collect(ddpm, folder / "set", samples=4, keep=2, steps=4, scheduler="ddim")
    made = {}
    for target, recipe in (("portable", "w8a8-minmax"), ("tensorrt", "w4a8-minmax")):
        checkpoint = calibrate(
            ddpm, folder / target, recipe=recipe, effort="fast", calibration=data, target=target
        )
        assert isinstance(checkpoint, Artifact)
        made[target] = export(checkpoint, folder / f"{target}-onnx")
    return made


def test_an_export_for_tensorrt_is_clean(bundles: dict[str, Artifact]) -> None:
    for version in ("10.8", "11.4"):
        report = lint(bundles["tensorrt"].path, tensorrt=version)
        assert (report.counts["E"], report.counts["W"]) == (0, 0)
    assert {finding.rule for finding in report.findings if finding.waived} <= WAIVERS.keys()
    assert report.macs["shares"]["int8"] > 0.5


def test_a_bundle_says_what_lint_found(bundles: dict[str, Artifact]) -> None:
    report = lint(bundles["tensorrt"].path)
    told = bundles["tensorrt"].facts.lint
    assert told.counts == report.counts
    assert sum(told.rules.values()) == sum(report.counts.values())
    assert sum(told.waived.values()) == sum(bool(finding.waived) for finding in report.findings)
    assert told.shares == report.macs["shares"]
    assert bundles["portable"].facts.lint is None


def test_a_portable_export_quantizes_layers_that_are_too_thin(bundles: dict[str, Artifact]) -> None:
    report = lint(bundles["portable"].path, target="portable")
    warned = [f for f in report.findings if f.severity in "EW" and f.waived is None]
    weights = {
        tensor.name.removesuffix(".weight.codes").removesuffix(".weight.0.codes"): tensor.dims
        for tensor in onnx.load(graph_file(bundles["portable"].path)).graph.initializer
        if tensor.name.endswith(".codes")
    }
    assert warned
    assert {finding.rule for finding in warned} == {"TRT024"}
    for finding in warned:
        assert max(weights.get(finding.node.partition("/")[0], (8, 8))[:2]) < 2 * CHANNELS


def test_a_waiver_is_for_our_own_graphs(bundles: dict[str, Artifact], tmp_path: Path) -> None:
    """Others may have quantized our float export, and metadata lives on."""
    source = graph_file(bundles["portable"].path)
    assert any(finding.waived for finding in lint(source).findings)
    model = onnx.load(source)
    model.producer_name = "another"
    onnx.save(model, tmp_path / "theirs.onnx")
    theirs = lint(tmp_path / "theirs.onnx")
    assert not any(finding.waived for finding in theirs.findings)
    assert any(finding.rule in WAIVERS for finding in theirs.findings)


def test_the_forecast_counts_as_engines_do(bundles: dict[str, Artifact]) -> None:
    """The share that `build-engine` expects to run in int8, computed on another way."""
    source = graph_file(bundles["portable"].path)
    macs = graph_macs(source, {"sample": (1, 3, 8, 8), "timestep": ()})
    meant = meant_int8(source)
    said = lint(source).macs
    assert said["total"] == sum(macs.values())
    share = sum(count for name, count in macs.items() if name in meant) / sum(macs.values())
    assert said["shares"]["int8"] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    ("module", "rows", "split", "thin"),
    [
        (nn.Linear(32, 32), 64, (), False),
        (nn.Linear(32, 32), 1, (), True),
        (nn.Linear(32, 8), 64, (), True),
        (nn.Conv2d(32, 32, 3), 64, (), False),
        (nn.Conv2d(8, 8, 3), 64, (), True),
        (nn.Conv2d(32, 8, 3), 64, (), False),
        (nn.Conv2d(32, 12, 3), 64, (20, 12), True),
    ],
)
def test_what_is_left_in_floats_for_tensorrt(
    module: nn.Module, rows: int, split: tuple[int, ...], thin: bool
) -> None:
    macs = rows * module.get_parameter("weight").numel()
    layer = Layer("x", 0, "x", "x", split, False, False, False, macs)
    assert too_thin(module, layer) == thin


def test_waivers_speak_of_rules() -> None:
    assert WAIVERS.keys() <= rules().keys()


def test_the_page_is_in_step_with_the_rules() -> None:
    page = Path(__file__).parents[3] / "docs" / "lint.md"
    assert in_step(page.read_text()) == page.read_text(), (
        "run: python -m qdeploy.export.lint.table docs/lint.md"
    )


# -- the command line --------------------------------------------------------------------------------------


def test_json_and_exit_codes(qdeploy: Run, bundles: dict[str, Artifact], tmp_path: Path) -> None:
    clean = qdeploy("lint", bundles["tensorrt"].path, "--json")
    assert clean.exit_code == 0
    said = json.loads(clean.stdout)
    assert {"path", "target", "findings", "counts", "macs"} <= said.keys()
    assert {"rule", "severity", "node", "message", "verified"} <= said["findings"][0].keys()
    onnx.save(CASES["TRT002"].failing, tmp_path / "bad.onnx")
    bad = qdeploy("lint", tmp_path / "bad.onnx", "--json")
    assert bad.exit_code == 3
    assert json.loads(bad.stdout)["counts"]["E"] == 4
    fixed = qdeploy("lint", tmp_path / "bad.onnx", "--fix", "-o", tmp_path / "good.onnx")
    assert fixed.exit_code == 0
    assert "fixed TRT002 (2)" in fixed.stdout
    assert qdeploy("lint", tmp_path / "good.onnx").exit_code == 0


def test_inferred_rules_say_so(qdeploy: Run, tmp_path: Path) -> None:
    onnx.save(CASES["TRT030"].failing, tmp_path / "inferred.onnx")
    onnx.save(CASES["TRT022"].failing, tmp_path / "documented.onnx")
    lines = {name: qdeploy("lint", tmp_path / name).stdout for name in ("inferred.onnx", "documented.onnx")}
    assert next(x for x in lines["inferred.onnx"].splitlines() if "TRT030" in x).endswith(
        "(unverified on hardware)"
    )
    assert "hardware" not in next(x for x in lines["documented.onnx"].splitlines() if "TRT022" in x)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("missing.onnx",), 5, "neither an ONNX file"),
        (("notes.txt",), 5, "damaged or no ONNX graph"),
        (("outside.onnx",), 5, "weights, which is missing"),
        (("good.onnx", "--target", "abacus"), 2, "unknown target"),
        (("good.onnx", "--tensorrt", "new"), 2, "no version"),
        (("good.onnx", "--shapes", "x"), 2, "--shapes"),
        (("good.onnx", "--fix"), 2, "belong together"),
        (("good.onnx", "--fix", "-o", "good.onnx"), 2, "name another file"),
        (("good.onnx", "--fix", "-o", "."), 2, "cannot be written"),
        (("good.onnx", "--fix", "-o", "notes.txt/x.onnx"), 2, "cannot be written"),
    ],
)
def test_refusals(
    qdeploy: Run,
    arguments: tuple[str, ...],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no graph")
    onnx.save(good(), "good.onnx")
    onnx.save(good(), "outside.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    Path("weights").unlink()
    result = qdeploy("lint", *arguments)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
