"""A checkpoint is complete in itself: integer codes and scales in, the very same network out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.session import Session
from qdeploy.model.folder import Model, open_model
from qdeploy.model.inputs import denoise
from qdeploy.quant import checkpoint
from qdeploy.quant.checkpoint import load_checkpoint, write_checkpoint, write_probe
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import full_precision
from qdeploy.quant.operators import code_type, round_float
from qdeploy.quant.packing import pack, packed_bytes, unpack
from qdeploy.quant.state import code_shapes, quantizers, read_state, write_state
from qdeploy.recipe.formats import FORMATS, Format, parse_format
from qdeploy.store.artifact import Artifact
from qdeploy.store.probe import PROBE
from qdeploy.system.errors import InvalidInputError
from qdeploy.workflows.calibrated_facts import any_attention
from tests.helpers import MemoryRows, calibrating, minmax_layer, reseal, some_facts
from tests.models import ddpm_folder

DATA = MemoryRows.noisy()
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w4a8": {"weights": "int4"},
    "w4a8 with zero points": {"weights": "uint4", "activations": "uint8", "target": "openvino"},
    "w4": {"weights": "int4", "activations": "none"},
    "simulated attention": {"weights": "uint4", "coverage": "qdiffusion-paper"},
}


@contextmanager
def calibrated(model: Model, output: Path, **recipe: Any) -> Iterator[Session]:
    with calibrating(model.load(), DATA, output, **recipe) as session:
        minmax.WeightRanges().run(session)
        if session.recipe.activations != "none":
            minmax.ActivationRanges().run(session)
        for layer in quantized_layers(session.denoiser).values():
            minmax.round_to_nearest(layer)
        yield session


def written(session: Session, model: Model) -> Artifact:
    attentions = list(session.structure.attentions) if any_attention(session) else []
    write_checkpoint(session.draft, model, session.denoiser, session.layers, attentions)
    write_probe(session.draft, session.denoiser, DATA.inputs([0, 5, 9]))
    return session.draft.finish(some_facts(component=model.name))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(ddpm_folder(tmp_path_factory.mktemp("model") / "ddpm", channels=(8, 16, 16)))


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def made(
    request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, Artifact]:
    with calibrated(model, tmp_path_factory.mktemp("checkpoint") / "out", **request.param) as session:
        return session, written(session, model)


# -- in and out --------------------------------------------------------------------------------------------


def test_what_is_loaded_computes_the_same_bits(made: tuple[Session, Artifact]) -> None:
    session, artifact = made
    inputs = DATA.inputs(range(7))
    with torch.no_grad():
        assert torch.equal(denoise(load_checkpoint(artifact), inputs), denoise(session.denoiser, inputs))


def test_networks_may_look_at_the_type_of_a_weight(made: tuple[Session, Artifact]) -> None:
    """Kandinsky's image projection moves its input to ``weight.dtype``."""
    for layer in quantized_layers(load_checkpoint(made[1])).values():
        assert layer.weight.dtype == torch.float32
        assert layer.weight.device == layer.device


def test_loading_runs_no_network_and_needs_no_flags(
    made: tuple[Session, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QD-13: the released code creates split quantizers in a dry run, and its keys depend on flags."""
    session, artifact = made

    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was run")

    monkeypatch.setattr(nn.Module, "__call__", run)
    loaded, own = quantized_layers(load_checkpoint(artifact.path)), quantized_layers(session.denoiser)
    assert {path: layer.split for path, layer in loaded.items()} == {p: own[p].split for p in loaded}
    assert loaded.keys() == own.keys()
    assert any(layer.split for layer in loaded.values())
    assert all(len(layer.weight_quantizers) == max(1, len(layer.split)) for layer in loaded.values())


def test_every_number_survives(made: tuple[Session, Artifact]) -> None:
    session, artifact = made
    before, after = read_state(session.denoiser), read_state(load_checkpoint(artifact))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_inputs_are_tied_again(made: tuple[Session, Artifact]) -> None:
    session, artifact = made
    own, loaded = (list(quantizers(network)) for network in (session.denoiser, load_checkpoint(artifact)))
    assert [name for name, _ in own] == [name for name, _ in loaded]


def test_the_probe_holds_what_the_network_gave(made: tuple[Session, Artifact]) -> None:
    session, artifact = made
    probe = load_file(artifact.file(PROBE))
    inputs = {name.removeprefix("input."): rows for name, rows in probe.items() if name.startswith("input.")}
    with torch.no_grad():
        assert torch.equal(denoise(load_checkpoint(artifact), inputs), probe["simulated"])
        with full_precision(session.denoiser):
            assert torch.equal(denoise(session.denoiser, inputs), probe["reference"])
    assert not torch.equal(probe["simulated"], probe["reference"])


# -- size --------------------------------------------------------------------------------------------------


def test_codes_take_as_many_bits_as_their_format_has(made: tuple[Session, Artifact], model: Model) -> None:
    """QD-14: the released code stores float weights and float roundings, more than the float model."""
    session, artifact = made
    tensors = load_file(artifact.file(f"{model.name}/quantized.safetensors"))
    bits = parse_format(session.recipe.weights).bits  # type: ignore[union-attr]
    weights = sum(shape.numel() for shape in map(torch.Size, code_shapes(session.denoiser).values()))
    codes = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".codes"))
    assert codes == pytest.approx(weights * 4 * bits / 32, rel=0.01)
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    assert max(tensor.ndim for tensor in floats) <= 1  # scales, and nothing as large as a weight
    assert {name.rpartition(".")[2] for name in tensors} == {"scale", "zero_point", "codes"}


def test_no_quantized_weight_is_stored_in_float_too(made: tuple[Session, Artifact], model: Model) -> None:
    session, artifact = made
    kept = load_file(artifact.file(f"{model.name}/parameters.safetensors"))
    stored = [name.replace(".inner.", ".") for name in kept]
    quantized = {f"{layer.path}.weight" for layer in session.layers}
    assert not quantized & set(stored)
    assert set(stored) | quantized == set(model.build().state_dict())


def test_a_checkpoint_of_a_wide_network_is_as_small_as_its_bits(tmp_path: Path) -> None:
    """The whole file, its header and scales included, is within one per cent of b / 32 of the weights."""
    wide = nn.Sequential(nn.Linear(2048, 512), nn.Linear(512, 512)).requires_grad_(False)
    for weights_in, bits, beside in (
        ("int8", 8, 0.02),
        ("int4", 4, 0.02),
        ("fp8", 8, 0.02),
        ("int4b128", 4, 0.08),
    ):
        network = nn.Sequential(*(minmax_linear(layer, weights_in) for layer in wide))
        state = read_state(network)
        size = sum(tensor.nbytes for tensor in state.values())
        weights = sum(layer.weight.nbytes for layer in wide)  # type: ignore[union-attr, misc]
        assert size <= weights * bits / 32 * (1 + beside)  # scales: 4 bytes, zero points: 1
        assert size >= weights * bits / 32


def minmax_linear(layer: nn.Module, weights: str) -> nn.Module:
    quantized = minmax_layer(layer, torch.zeros(1), FORMATS[weights], None)
    minmax.round_to_nearest(quantized)
    return quantized


# -- packing -----------------------------------------------------------------------------------------------


@given(
    st.sampled_from(list(FORMATS.values())), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.data()
)
def test_packing_is_undone_exactly(number_format: Format, shape: list[int], data: st.DataObject) -> None:
    size = torch.Size(shape).numel()
    code = st.integers(number_format.qmin, number_format.qmax)
    drawn = data.draw(st.lists(code, min_size=size, max_size=size))
    codes = torch.tensor(drawn, dtype=torch.int16).to(code_type(number_format)).view(shape)
    if number_format.floating:
        codes = round_float(codes.float(), number_format).to(torch.float8_e4m3fn)
    packed = pack(codes, number_format)
    again = unpack(packed, number_format, tuple(shape))
    assert again.dtype == codes.dtype
    assert torch.equal(again.float(), codes.float())
    assert packed.nbytes == packed_bytes(size, number_format) == -(-size * number_format.bits // 8)
    if number_format.bits == 4 and not number_format.floating:
        # as it was before other widths were packed: the first code in the low half
        first = int(codes.flatten()[0]) - number_format.qmin
        assert int(packed[0]) & 15 == first


# -- what does not belong ----------------------------------------------------------------------------------


@pytest.fixture
def state() -> tuple[nn.Module, dict[str, Tensor]]:
    network = nn.Sequential(minmax_linear(nn.Linear(4, 3), "int4"))
    return network, read_state(network)


def test_a_missing_tensor_is_named(state: tuple[nn.Module, dict[str, Tensor]]) -> None:
    network, tensors = state
    del tensors["0.weight.0.zero_point"]
    with pytest.raises(InvalidInputError, match=r"0\.weight\.0\.zero_point"):
        write_state(network, tensors, code_shapes(network))


def test_a_state_of_another_model_is_refused(state: tuple[nn.Module, dict[str, Tensor]]) -> None:
    _, tensors = state
    other = nn.Sequential(minmax_linear(nn.Linear(4, 5), "int4"))
    with pytest.raises(InvalidInputError, match="another model"):
        write_state(other, tensors, code_shapes(other))


def test_damage_is_found_before_anything_is_built(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with calibrated(model, tmp_path / "out") as session:
        artifact = written(session, model)
    file = artifact.file(f"{model.name}/quantized.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    monkeypatch.setattr(checkpoint, "checkpoint_model", None)
    with pytest.raises(InvalidInputError, match=r"damaged.*quantized\.safetensors"):
        load_checkpoint(artifact.path)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "input"])
def test_scales_that_no_calibration_makes_are_refused(
    model: Model, tmp_path: Path, value: float, kind: str
) -> None:
    with calibrated(model, tmp_path / "out") as session:
        artifact = written(session, model)
    file = artifact.file(f"{model.name}/quantized.safetensors")
    tensors = load_file(file)
    name = sorted(name for name in tensors if f".{kind}." in name and name.endswith(".scale"))[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file)
    reseal(artifact.path)
    with pytest.raises(InvalidInputError, match=rf"{name.replace('.', '[.]')}'.*calibrate again"):
        load_checkpoint(artifact.path)


def test_a_checkpoint_says_where_it_goes_back_into_a_pipeline(
    made: tuple[Session, Artifact], model: Model
) -> None:
    _, artifact = made
    assert artifact.file("model_index.json").read_bytes() == (model.path / "model_index.json").read_bytes()
    assert artifact.file("scheduler/scheduler_config.json").is_file()
    assert json.loads(artifact.file(f"{model.name}/config.json").read_text()) == model.config


def test_split_points_are_those_that_were_traced(made: tuple[Session, Artifact], model: Model) -> None:
    session, artifact = made
    described = json.loads(artifact.file(f"{model.name}/layers.json").read_text())["layers"]
    assert {layer["path"]: tuple(layer["split"]) for layer in described} == {
        layer.path: layer.split for layer in session.layers
    }
    assert [layer["path"] for layer in described] == [layer.path for layer in session.layers]


def test_the_float_model_is_what_the_full_precision_switch_gives(model: Model, tmp_path: Path) -> None:
    with calibrated(model, tmp_path / "out") as session, full_precision(session.denoiser), torch.no_grad():
        inputs = DATA.inputs(range(3))
        assert torch.equal(denoise(session.denoiser, inputs), denoise(model.load(), inputs))
