"""Mistakes in packages of others: each is refused, or seen, in one sentence that says where it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result

from qdeploy.calibrate.run_stages import run_stages
from qdeploy.evaluate.check_result import CheckResult
from qdeploy.evaluate.metrics.base import metrics
from qdeploy.evaluate.quality_parts import results_of
from qdeploy.export.lower import registered_passes
from qdeploy.system.errors import CapabilityError
from tests.helpers import MemoryRows, calibrating, tiny_unet
from tests.plugins import install
from tests.system.test_plugins import PASS, STAGE


@pytest.mark.parametrize("targets", ['("portabel",)', '"portable"', "()"])
def test_a_pass_that_would_never_run_is_refused(
    targets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PASS.replace('("portable",)', targets)
    install(tmp_path, monkeypatch, {"qdeploy.passes": {"signed": "my_package.signed"}}, signed=source)
    with pytest.raises(
        CapabilityError, match=r"pass my_package\.signed\.Signed of my_package has targets .*portable, "
    ):
        registered_passes("onnxruntime")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("session.once('step', int); session.once('step', int)", "two steps under the name 'step'"),
        (
            "session.once('step', lambda: [setattr(q, 'scale', q.scale[:1]) for layer in "
            "session.quantized(session.layers) for q in layer.weight_quantizers] and None)",
            r"scales of shape \[1\]: int8 takes \[8\] there",
        ),
    ],
)
def test_a_stage_whose_result_would_be_lost_or_wrong_is_refused(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = STAGE.replace("pass\n", f"{body}\n")
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"idle": "my_package.idle"}}, idle=source)
    data = MemoryRows.noisy(size=16)
    with (
        calibrating(tiny_unet(size=16), data, tmp_path / "out", method="idle") as session,
        pytest.raises(CapabilityError, match=message),
    ):
        run_stages(session)


@pytest.mark.parametrize(
    ("value", "kept"), [("1.5", 1.5), ("{'value': 2}", {"value": 2}), ("float('nan')", None), ("None", None)]
)
def test_a_metric_gives_what_json_can_hold(
    value: str, kept: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(value, tmp_path, monkeypatch) == ({} if kept is None else {"light": kept})


@pytest.mark.parametrize("value", ["__import__('torch').ones(1)", "__import__('numpy').float32(1)", "[{1}]"])
def test_a_metric_that_gives_something_else_is_named(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapabilityError, match="the metric 'light' of my_package gives "):
        measured(value, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.1235"),
        ({"value": 2}, "2.0000"),
        ({"mean": 0.5}, "0.5000"),
        ("grey", "grey"),
        ([1], "in --json"),
    ],
)
def test_a_metric_stands_in_the_table_of_a_check(
    value: object, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured("None", tmp_path, monkeypatch)
    parity = {
        "expected": "simulated",
        "sqnr_db": 90.0,
        "same_rows": 1.0,
        "rounding_floor_db": 45.0,
        "pairs": {},
    }
    quality = {
        "source": "trajectory",
        "sqnr_db": {"median": 30.0, "worst": 20.0},
        "light": value,
        "ssim": 1.0,
    }
    subject: Any = SimpleNamespace(path="subject")
    table = CheckResult(subject, parity, quality, {}, []).table()
    assert re.search(rf"^ *light +{shown}$", table, re.MULTILINE)
    assert (
        "ssim" not in table
    )  # the table shows some of what this package measures, and all of what others do


def measured(value: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The results of a metric that gives a value, written in Python."""
    source = f"""
from qdeploy.evaluate.metrics.base import Metric

class Meter:
    def result(self):
        return {value}

METRIC = Metric("light", "how much light", lambda model: Meter())
"""
    install(folder, monkeypatch, {"qdeploy.metrics": {"light": "my_package.light"}}, light=source)
    return results_of({"light": metrics()["light"].start(None)})  # type: ignore[arg-type, dict-item]


def test_an_error_in_another_package_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qdeploy: Callable[..., Result], ddpm: Path
) -> None:
    source = STAGE.replace("pass\n", "self.nothing\n").replace(
        "    times: int", "    rows = False\n    times: int"
    )
    recipe = "stages: [nothing, weight-ranges]\nweights: int8\nactivations: none\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    install(tmp_path, monkeypatch, {"qdeploy.methods": {"idle": "my_package.idle"}}, idle=source)
    result = qdeploy("calibrate", ddpm, "-o", tmp_path / "out", "-r", tmp_path / "recipe.yaml")
    assert result.exit_code == 1
    assert (
        "qdeploy: error in my_package.idle, which is not part of qdeploy: AttributeError: " in result.stderr
    )
