"""What other packages register, with real distributions: a package and its ``.dist-info`` on sys.path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from click.testing import Result

from qdeploy import calibrate
from qdeploy.engines.registry import backends
from qdeploy.evaluate.metrics.base import metrics
from qdeploy.export.lint.rule import rules
from qdeploy.export.lower import lower, registered_passes
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import methods, stages
from qdeploy.system import plugins
from qdeploy.system.errors import CapabilityError, UsageError
from tests.plugins import install

STAGE = """
from dataclasses import dataclass
from qdeploy import ActivationRanges, Method, Stage, WeightRanges

@dataclass(frozen=True)
class Nothing(Stage):
    name = "nothing"
    description = "does nothing"
    times: int = 1

    def run(self, session):
        pass

METHOD = Method("idle", "arXiv 0", "does nothing first", (Nothing(times=3), WeightRanges(), ActivationRanges()))
"""
PASS = """
from onnx_ir.passes import InPlacePass, PassResult

class Signed(InPlacePass):
    targets = ("portable",)

    def call(self, model):
        found = [node for node in model.graph if node.op_type == "Abs"]
        for node in found:
            node.op_type = "Relu"
        return PassResult(model, modified=bool(found))
"""
RULE = """
from qdeploy.evaluate.quality_parts import results_of
from qdeploy.export.lint.rule import rule

@rule("OV900", "I", "a graph has a name", "else nobody knows it", "INF")
def named(net, scope):
    yield from ()
"""


def test_a_method_with_a_stage_of_its_own_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "idle" not in methods()
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"idle": "my_package.idle"}}, idle=STAGE)
    assert stages()["nothing"].defaults() == {"times": 1}
    assert resolve_recipe(method="idle").to_json()["stages"][0] == {"nothing": {"times": 3}}
    assert resolve_recipe(stages=[("nothing", {"times": 2})]).stages[0].options == {"times": 2}


def test_one_object_registers_as_well_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"idle": "my_package.idle:METHOD"}}, idle=STAGE)
    assert "idle" in methods()
    assert "nothing" not in stages()


def test_a_pass_registers_for_its_targets_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"qdeploy.passes": {"signed": "my_package.signed"}}, signed=PASS)
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
    )
    assert [node.op_type for node in lower(ir.from_proto(graph), "portable").graph] == ["Relu"]
    assert registered_passes("openvino") == []
    assert [node.op_type for node in lower(ir.from_proto(graph), "openvino").graph] == ["Abs"]


@pytest.mark.parametrize(("op", "said"), [("Abs", "changed the graph"), ("Neg", "found nothing to change")])
def test_a_pass_is_seen(
    op: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, {"qdeploy.passes": {"signed": "my_package.signed"}}, signed=PASS)
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) {{ y = {op} (x) }}'
    lower(ir.from_proto(onnx.parser.parse_model(text)), "portable")
    assert capsys.readouterr().err == f"pass my_package.signed.Signed: {said}\n"


def test_a_stage_that_was_edited_is_another_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ddpm: Path
) -> None:
    source = STAGE.replace("    times: int", "    rows = False\n    times: int")
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"idle": "my_package.idle"}}, idle=source)

    def made(overwrite: bool = False) -> Any:
        chosen = ["nothing", "weight-ranges"]
        return calibrate(
            ddpm, tmp_path / "out", stages=chosen, weights="int8", activations="none", overwrite=overwrite
        )

    first = made()
    assert made().manifest.request == first.manifest.request
    file = tmp_path / "my_package-site-packages" / "my_package" / "idle.py"
    file.write_text(f"{source}\n# edited")
    with pytest.raises(UsageError, match="holds another artifact"):
        made()
    again = made(overwrite=True)
    assert again.sha256 == first.sha256  # the content is what counts, and that is the same
    assert again.manifest.request != first.manifest.request


def test_code_of_this_package_is_told_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugins.code_of(stages().values()) == {}
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"idle": "my_package.idle"}}, idle=STAGE)
    assert plugins.code_of(stages().values()).keys() == {"my_package.idle"}


def test_a_lint_rule_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdeploy.export.lint import rule

    monkeypatch.setattr(rule, "REGISTERED", dict(rule.REGISTERED))
    install(tmp_path, monkeypatch, {"qdeploy.lint_rules": {"names": "my_package.names"}}, names=RULE)
    assert "OV900" in rules()


@pytest.mark.parametrize(
    ("group", "ask", "kind"),
    [
        ("qdeploy.methods", methods, "method"),
        ("qdeploy.metrics", metrics, "metric"),
        ("qdeploy.engines", backends, "backend"),
        ("qdeploy.lint_rules", rules, "rule"),
        ("qdeploy.passes", lambda: registered_passes("portable"), "pass"),
    ],
)
@pytest.mark.parametrize("source", ["import nothing_of_the_kind", "1 / 0", "def"])
def test_what_cannot_be_imported_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    ask: Callable[[], object],
    kind: str,
    source: str,
) -> None:
    install(tmp_path, monkeypatch, {group: {"broken": "my_package.broken"}}, broken=source)
    with pytest.raises(CapabilityError) as caught:
        ask()
    assert "the package my_package registers broken = my_package.broken" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_line_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qdeploy: Callable[..., Result]
) -> None:
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"broken": "my_package.broken"}}, broken="1 / 0")
    result = qdeploy("calibrate", "digits", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 4
    error = json.loads(result.stdout)
    assert error["exit_code"] == 4
    assert "my_package registers broken" in error["error"]
    assert not (tmp_path / "out").exists()


def test_two_packages_cannot_give_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        install(tmp_path, monkeypatch, {"qdeploy.methods": {name: f"{name}.idle"}}, name, idle=STAGE)
    with pytest.raises(CapabilityError, match="first and second both register a method 'idle'"):
        methods()


def test_what_the_package_brings_is_registered_like_any_other() -> None:
    for group in (plugins.METHODS, plugins.METRICS, plugins.ENGINES, plugins.LINT_RULES):
        assert plugins.registered(group)[0].package == "qdeploy"
