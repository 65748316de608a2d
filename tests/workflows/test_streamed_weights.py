"""Recipes that look at weights alone read them one after the other: the network is never in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qdeploy.calibration_set.example_rows import ExampleRows
from qdeploy.model.folder import Model, open_model
from qdeploy.model.inputs import denoise
from qdeploy.model.unloaded import WeightInFile, load_rest, weight_of
from qdeploy.store.probe import read_probe
from qdeploy.system.errors import InvalidInputError
from qdeploy.workflows.calibrate import calibrate
from tests.models import ddpm_folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net stored in bfloat16, as most models are published."""
    path = ddpm_folder(tmp_path_factory.mktemp("narrow") / "model", channels=(32, 64))
    for file in path.rglob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return path


@pytest.mark.parametrize("recipe", ["w4-blocks", "w8-weights"])
def test_streamed_weights_give_the_same_checkpoint(
    narrow: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = calibrate(narrow, tmp_path / "streamed", recipe=recipe)
    plain = Model.load
    monkeypatch.setattr(Model, "load", lambda self, device="cpu", streamed=False: plain(self, device))
    loaded = calibrate(narrow, tmp_path / "loaded", recipe=recipe)
    for name in ("quantized", "parameters"):
        one, other = load_file(getattr(streamed, name)), load_file(getattr(loaded, name))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    (_, *one_probe), (_, *other_probe) = read_probe(streamed.path), read_probe(loaded.path)
    for here, there in zip(one_probe, other_probe, strict=True):
        assert here is not None
        assert there is not None
        assert torch.equal(here, there)


def test_few_layers_weights_are_in_memory_at_once(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[StorageWeakRef, int]] = []
    most, read = [0], WeightInFile.read

    def counted(self: WeightInFile) -> Tensor:
        tensor = read(self)
        if tensor.ndim > 1:
            given.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
            most[0] = max(most[0], sum(size for storage, size in given if not storage.expired()))
        return tensor

    monkeypatch.setattr(WeightInFile, "read", counted)
    calibrate(narrow, tmp_path / "checkpoint", recipe="w4-blocks")
    sizes = [p.numel() * 4 for p in open_model(narrow).load().parameters() if p.ndim > 1]
    assert 0 < most[0] <= 3 * max(sizes)  # those before, while the next one is read
    assert most[0] < sum(sizes) / 3


def test_a_streamed_network_computes_what_a_loaded_one_does(narrow: Path) -> None:
    model = open_model(narrow)
    inputs = ExampleRows(model).inputs([0, 1])
    streamed, loaded = model.load(streamed=True), model.load()
    with torch.no_grad():
        assert torch.equal(denoise(streamed, inputs), denoise(loaded, inputs))
    layers = {path: m for path, m in streamed.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert all(layer.get_parameter("weight").is_meta for layer in layers.values())
    first = next(iter(layers))
    weight = weight_of(layers[first])
    assert weight is not None
    assert torch.equal(weight, loaded.get_submodule(first).get_parameter("weight"))
    load_rest(streamed, {layers[first]})
    assert [path for path, layer in layers.items() if layer.get_parameter("weight").is_meta] == [first]
    with torch.no_grad():
        assert torch.equal(denoise(streamed, inputs), denoise(loaded, inputs))


def test_streamed_weights_are_looked_at_before_anything_begins(narrow: Path, tmp_path: Path) -> None:
    path = ddpm_folder(tmp_path / "model", channels=(32, 64))
    file = next(path.rglob("*.safetensors"))
    tensors = load_file(file)
    tensors["conv_in.weight"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(InvalidInputError, match=r"hold NaN or Inf, first in conv_in\.weight"):
        calibrate(path, tmp_path / "checkpoint", recipe="w4-blocks")
    assert not (tmp_path / "checkpoint").exists()
