"""A preflight says in seconds what will work with a model, and why something will not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdeploy.cli import main
from qdeploy.workflows.preflight import preflight
from tests.models import ddpm_folder, stable_diffusion_folder
from tests.models.field import wan_folder


def steps_of(result: object) -> dict[str, bool | None]:
    return {finding.step: finding.works for finding in result.findings}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_model_that_goes_through_passes_every_step(tmp_path: Path) -> None:
    result = preflight(
        wan_folder(tmp_path / "wan"), steps=3, prompts=["a"], guidance=3.0, height=16, width=16
    )
    assert result.passed, result.table()
    said = {finding.step: finding.detail for finding in result.findings}
    assert "3 steps with 2 calls each" in said["denoiser calls, and one repeated"]
    assert "any number of rows" in said["trace into ONNX"]
    assert not list((tmp_path / "wan").glob("qdeploy*"))


def test_what_the_pipeline_needs_is_said_and_later_steps_are_not_tried(tmp_path: Path) -> None:
    result = preflight(stable_diffusion_folder(tmp_path / "sd"), steps=3)
    assert not result.passed
    assert "needs prompts" in str(result.problem)
    assert steps_of(result)["trace into ONNX"] is None


def test_the_command_line_prints_a_table_and_ends_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ddpm_folder(tmp_path / "ddpm")
    with pytest.raises(SystemExit) as ended:
        main(["preflight", str(model), "--steps", "3", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as ended:
        main(["preflight", str(model), "--steps", "3"])
    assert ended.value.code == 5
    captured = capsys.readouterr()
    assert "truncated" in captured.err
    assert "weights" in captured.out
