"""A set keeps the range of every layer's input over time, from the pass that records it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qdeploy.calibration_set import collecting as trajectory
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.layer_ranges import LayerRanges
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.network.roles import find_structure
from qdeploy.network.tracer import WEIGHTED
from qdeploy.plots import pictures
from qdeploy.plots.pictures import range_heat_map
from qdeploy.quant.time_ranges import merge_ranges, read_ranges, spans, tensor_names
from qdeploy.store.artifact import Artifact, open_artifact
from tests.models import stable_diffusion_folder

OPTIONS: dict[str, Any] = {"samples": 5, "batch": 2, "keep": 3, "steps": 6, "scheduler": "ddim"}


@pytest.fixture(scope="module", autouse=True)
def drawn() -> Iterator[None]:
    """Sets are drawn here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "range_heat_map", range_heat_map)
        yield


@pytest.fixture(scope="module")
def made(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = collect(ddpm, tmp_path_factory.mktemp("sets") / "set", **OPTIONS)
    assert isinstance(artifact, Artifact)
    return artifact


def ranges_of(artifact: Any) -> dict[str, Tensor]:
    ranges = read_ranges(artifact)
    assert ranges is not None
    return ranges


def test_ranges_are_those_of_the_rows_of_the_set(ddpm: Path, made: Artifact) -> None:
    data, denoiser, ranges = CalibrationSet.open(made.path), open_model(ddpm).load(), ranges_of(made)
    assert ranges["timesteps"].tolist() == data.timesteps.float().unique().tolist()
    seen: dict[str, Tensor] = {}
    for path, module in denoiser.named_modules():
        if isinstance(module, WEIGHTED):
            module.register_forward_pre_hook(lambda module, args, path=path: seen.update({path: args[0]}))
    for column, t in enumerate(ranges["timesteps"].tolist()):
        with torch.no_grad():
            denoise(denoiser, data.inputs((data.timesteps == t).nonzero().flatten()))
        assert set(tensor_names(ranges)) == seen.keys()
        for path, x in seen.items():
            found = torch.stack([ranges[f"{path}.{side}"][column] for side in ("low", "high")])
            torch.testing.assert_close(found, torch.stack(x.aminmax()), rtol=1e-3, atol=1e-4)


def test_layers_are_in_the_order_of_execution(ddpm: Path, made: Artifact) -> None:
    data = CalibrationSet.open(made.path)
    structure = find_structure(open_model(ddpm).load(), data.inputs([0]))
    assert tensor_names(ranges_of(made)) == [layer.path for layer in structure.layers]


def test_the_pipeline_is_watched_whatever_it_asks_for(tmp_path: Path) -> None:
    model = stable_diffusion_folder(tmp_path / "sd")
    artifact = collect(model, tmp_path / "set", prompts=["a cat"], samples=2, keep=3, steps=4)
    ranges = ranges_of(artifact)
    assert any("attn2.to_k" in name for name in tensor_names(ranges))
    assert bool(spans(ranges).isfinite().all())


def test_ranges_and_picture_are_the_same_every_time(ddpm: Path, made: Artifact, tmp_path: Path) -> None:
    again = collect(ddpm, tmp_path / "again", **OPTIONS)
    assert isinstance(again, Artifact)
    assert again.sha256 == made.sha256
    assert "ranges.safetensors" in made.files
    assert (again.path / "ranges.png").read_bytes() == (made.path / "ranges.png").read_bytes()


def test_the_picture_is_no_part_of_the_set(ddpm: Path, tmp_path: Path) -> None:
    made = collect(ddpm, tmp_path / "set", **OPTIONS)
    assert isinstance(made, Artifact)
    (made.path / "ranges.png").unlink()
    assert open_artifact(made.path).sha256 == made.sha256
    collect(ddpm, tmp_path / "set", **OPTIONS)
    with Image.open(made.path / "ranges.png") as image:
        assert image.format == "PNG"


def test_a_picture_that_cannot_be_written_spoils_nothing(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(ranges: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdeploy.plots.pictures.range_heat_map", refused)
    made = collect(ddpm, tmp_path / "set", **OPTIONS)
    assert isinstance(made, Artifact)
    assert "No space left" in capsys.readouterr().err
    assert not (made.path / "ranges.png").exists()


def test_an_interruption_before_the_ranges_are_merged_changes_nothing(
    ddpm: Path, made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(parts: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trajectory, "merge_ranges", stopped)
        with pytest.raises(KeyboardInterrupt):
            collect(ddpm, tmp_path / "set", **OPTIONS)
    parts = sorted((tmp_path / ".set.parts").glob("*/parts/*/ranges.safetensors"))
    assert len(parts) == 3
    parts[1].unlink()  # what is lost is recorded anew
    again = collect(ddpm, tmp_path / "set", **OPTIONS)
    assert isinstance(again, Artifact)
    assert again.sha256 == made.sha256


def test_only_calls_that_are_kept_are_watched_and_no_hook_is_left() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    now: list[float | None] = [None]
    with LayerRanges(network, lambda: now[0]) as watched, torch.no_grad():
        for t, value in ((None, 100.0), (5.0, 1.0), (None, 100.0), (2.0, -3.0), (5.0, 2.0)):
            now[0] = t
            network(torch.tensor([[value, 0.0]]))
    ranges = watched.tensors()
    assert ranges["timesteps"].tolist() == [2.0, 5.0]
    assert ranges["0.low"].tolist() == [-3.0, 0.0]
    assert ranges["0.high"].tolist() == [0.0, 2.0]
    assert tensor_names(ranges) == ["0", "2"]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_parts_merge_to_the_ranges_of_the_whole() -> None:
    parts = [
        {
            "timesteps": torch.tensor(timesteps),
            "b.low": torch.tensor(lows),
            "b.high": torch.tensor(lows) + 5,
            "a.low": torch.zeros(2),
            "a.high": torch.ones(2),
            "order": torch.tensor([1, 0]),
        }
        for timesteps, lows in (([1.0, 3.0], [-1.0, -2.0]), ([2.0, 3.0], [-4.0, -3.0]))
    ]
    merged = merge_ranges(parts)
    assert merged["timesteps"].tolist() == [1.0, 2.0, 3.0]
    assert merged["b.low"].tolist() == [-1.0, -4.0, -3.0]
    assert merged["b.high"].tolist() == [4.0, 1.0, 3.0]
    assert tensor_names(merged) == ["b", "a"]
    assert merged["a.high"].tolist() == [1.0, 1.0, 1.0]
