"""QNCD: smoothing that follows from the timestep's embedding, and a table of mean errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdeploy.calibrate.methods import qdiffusion, qncd
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qncd import SmoothEmbeddings, mean_errors, smoothing_factors
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import smooth
from qdeploy.calibration_set.collect import collect
from qdeploy.export.run import export
from qdeploy.model.inputs import denoise
from qdeploy.network.modulation import ADDITIVE, SCALE_SHIFT, Modulation, find_modulations
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.recipe.formats import int8
from qdeploy.recipe.stages import check_stages
from qdeploy.store.artifact import CORRECTION, Artifact
from qdeploy.store.correction_table import CorrectionTable, read_correction
from qdeploy.store.probe import PROBE
from qdeploy.system.errors import UsageError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import MemoryRows, calibrating, plain_options, relative, sqnr_db, tiny_unet
from tests.models import ddpm_folder

DATA = MemoryRows.noisy()
CLASSES = MemoryRows(
    {**DATA.tensors, "class_labels": torch.arange(len(DATA)) % 5}, torch.arange(len(DATA)) // 4
)


def scale_shift_unet(classes: int | None = None) -> nn.Module:
    """A U-Net whose residual blocks are scaled and shifted by the embedding, also while resampling."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=classes,
        )
    return network.eval().requires_grad_(False)


KINDS: dict[str, Callable[[], nn.Module]] = {ADDITIVE: tiny_unet, SCALE_SHIFT: scale_shift_unet}


def smoothed(session: Session) -> dict[str, QuantizedLayer]:
    found = quantized_layers(session.denoiser)
    return {path: layer for path, layer in found.items() if layer.smoothing is not None}


def without_quantizers(denoiser: nn.Module) -> None:
    """The student as it is, with nothing rounded."""
    for layer in quantized_layers(denoiser).values():
        layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()


# -- where the embedding enters ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_residual_block_of_both_kinds_is_found(kind: str) -> None:
    denoiser = KINDS[kind]()
    blocks = [path for path, module in denoiser.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    found = find_modulations(denoiser, DATA.inputs([0]))
    assert {place.kind for place in found} == {kind}
    assert {place.layers for place in found} == {(f"{block}.conv2",) for block in blocks}
    assert {place.projection for place in found} == {f"{block}.time_emb_proj" for block in blocks}


class Odd(nn.Module):
    """Both kinds in a network with no name that diffusers knows; the shift comes before the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.eins, self.zwei, self.drei = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.a, self.b, self.vier = nn.Linear(1, 8), nn.Linear(1, 16), nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        t = timestep.reshape(-1, 1).float() / 1000
        x = torch.tanh(self.eins(sample)) + self.a(t).reshape(-1, 8, 1, 1)
        x = self.zwei(nn.functional.silu(self.norm(x)))
        shift, scale = self.b(t)[..., None, None].split(8, dim=1)
        return (self.drei(shift + (scale + 1) * self.norm(x)) + self.vier(x).mean(1, keepdim=True),)


def test_blocks_are_found_by_what_they_compute_and_not_by_name() -> None:
    additive, scaled = find_modulations(Odd(), DATA.inputs([0]))
    assert (additive.kind, additive.projection, additive.layers) == (ADDITIVE, "a", ("zwei",))
    assert (additive.groups, additive.start, additive.channels) == (2, 0, 8)
    assert (scaled.kind, scaled.projection, scaled.layers) == (SCALE_SHIFT, "b", ("drei",))
    assert (scaled.start, scaled.channels) == (8, 8)
    output = torch.randn(5, 16)
    assert torch.equal(scaled.embedding(output), output[:, 8:])


def test_layers_that_read_one_modulated_tensor_are_found_together() -> None:
    """The transformer of DiT: q, k and v share an input quantizer, so they have to share S."""
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        patch_size=2,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([1]),
    }
    layers = [place.layers for place in find_modulations(network.eval(), inputs)]
    assert tuple(f"transformer_blocks.0.attn1.to_{name}" for name in "qkv") in layers


# -- the factors -------------------------------------------------------------------------------------------


def test_additive_factors_follow_the_standardised_embedding() -> None:
    """QNCD-2: S of the code is gamma times a clamped n, so it is negative or 0 with gamma."""
    embedding, gamma = torch.randn(50, 8), torch.tensor([2.0, -2, 1, -1, 0.5, -0.5, 0, 3])
    place = Modulation(ADDITIVE, "e", 0, 8, gamma=gamma, groups=2, eps=1e-5)
    grouped = embedding.view(50, 2, 4)
    n = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (gamma.abs() * n.view(50, 8).abs().clamp(min=1).mean(0)).clamp(min=1e-3)
    factors = smoothing_factors(place, embedding)
    torch.testing.assert_close(factors, expected)
    assert (factors > 0).all()
    torch.testing.assert_close(smoothing_factors(place, -embedding), expected)


def test_scale_shift_factors_are_the_mean_of_one_plus_scale() -> None:
    """QNCD-2: the code leaves out the 1, and normalises twice."""
    output = torch.randn(40, 12) - 1
    place = Modulation(SCALE_SHIFT, "e", 4, 4)
    expected = (1 + output[:, 4:8]).abs().mean(0)
    torch.testing.assert_close(smoothing_factors(place, output), expected)
    assert (smoothing_factors(place, torch.full((3, 12), -1.0)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_without_an_embedding_nothing_is_smoothed(tmp_path: Path, kind: str, bias: float) -> None:
    """P21: S is 1 throughout where the embedding is the same for all channels."""
    denoiser = KINDS[kind]()
    for place in find_modulations(denoiser, DATA.inputs([0])):
        projection: Any = denoiser.get_submodule(place.projection)
        projection.weight.zero_()
        projection.bias.fill_(bias)
    with calibrating(denoiser, DATA, tmp_path / "out") as session:
        SmoothEmbeddings(check=False).run(session)
    assert smoothed(session)
    for layer in smoothed(session).values():
        assert layer.smoothing is not None
        torch.testing.assert_close(layer.smoothing, torch.ones_like(layer.smoothing))


def test_factors_come_from_the_timesteps_and_not_from_the_rows(tmp_path: Path) -> None:
    """QNCD-2: the code takes the first sample of each batch. QNCD-3: with another random t at every start."""
    found = []
    for number, data in enumerate((DATA, MemoryRows.noisy(images=5, steps=3))):
        with calibrating(tiny_unet(), data, tmp_path / str(number)) as session:
            session.training_timesteps = 1000
            SmoothEmbeddings(check=False).run(session)
            found.append({path: layer.smoothing for path, layer in smoothed(session).items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])  # type: ignore[arg-type]


def test_embeddings_that_hold_classes_are_seen_on_the_rows(tmp_path: Path) -> None:
    denoiser = scale_shift_unet(classes=5)
    with calibrating(denoiser, CLASSES, tmp_path / "out") as session:
        assert not set(session.structure.time.features) & {
            place.projection for place in find_modulations(denoiser, CLASSES.inputs([0]))
        }
        seen: list[Tensor] = []
        path = "mid_block.resnets.0.time_emb_proj"
        handle = denoiser.get_submodule(path).register_forward_hook(lambda m, a, output: seen.append(output))
        with torch.no_grad(), session.teacher():
            denoise(denoiser, session.inputs(session.rows()))
        handle.remove()
        SmoothEmbeddings(check=False).run(session)
    expected = (1 + seen[0][:, :16]).abs().mean(0)
    layer = quantized_layers(denoiser)["mid_block.resnets.0.conv2"]
    assert layer.smoothing is not None
    torch.testing.assert_close(layer.smoothing, expected / expected.log().mean().exp(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_is_an_exponent(tmp_path: Path, strength: float) -> None:
    factors = []
    for number, chosen in enumerate((1.0, strength)):
        with calibrating(tiny_unet(), DATA, tmp_path / str(number)) as session:
            SmoothEmbeddings(strength=chosen, check=False).run(session)
            factors.append([layer.smoothing for layer in smoothed(session).values()])
    for whole, part in zip(*factors, strict=True):
        torch.testing.assert_close(part, whole.pow(strength))  # type: ignore[union-attr]


# -- the function stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_changes_nothing_in_full_precision(tmp_path: Path, kind: str) -> None:
    """P21 and QNCD-1: the code's full precision divides its input and not its weight."""
    inputs = DATA.inputs(range(6))
    with torch.no_grad():
        before = denoise(KINDS[kind](), inputs)
        with calibrating(KINDS[kind](), DATA, tmp_path / "out") as session:
            SmoothEmbeddings(check=False).run(session)
            assert any(
                float(layer.smoothing.max() / layer.smoothing.min()) > 1.2  # type: ignore[union-attr]
                for layer in smoothed(session).values()
            )
            assert all((layer.smoothing > 0).all() for layer in smoothed(session).values())  # type: ignore[operator]
            with session.teacher():
                assert torch.equal(denoise(session.denoiser, inputs), before)
            without_quantizers(session.denoiser)
            assert float((denoise(session.denoiser, inputs) - before).abs().max()) < 1e-4


def test_rounding_is_learned_for_the_smoothed_weight(tmp_path: Path) -> None:
    """QNCD-1: the code's roundings start from the weight that was not smoothed."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out", weights="int4") as session:
        layer = quantized_layers(session.denoiser)["mid_block.resnets.0.conv2"]
        smooth(layer, torch.linspace(1, 30, layer.weight.shape[1]))
        WeightRanges(finder="lp").run(session)
        qdiffusion.AdaRound().run(session)
        ((quantizer, weight),) = layer.weight_pairs()
        steps = weight / quantizer.scale.view(-1, 1, 1, 1)
        assert quantizer.codes is not None
        low, high = (c.clamp(-8, 7) for c in (steps.floor(), steps.floor() + 1))
        assert torch.all((quantizer.codes == low) | (quantizer.codes == high))
        assert not torch.allclose(weight, layer.weight)


def layer_errors(tmp_path: Path, weights: str, smoothing: dict[str, Any] | None) -> dict[str, float]:
    """Error of each layer that reads an embedding, on its full-precision inputs, with min-max scales."""
    with calibrating(scale_shift_unet(), DATA, tmp_path, weights=weights) as session:
        if smoothing is not None:
            SmoothEmbeddings(**smoothing).run(session)
        WeightRanges().run(session)
        ActivationRanges().run(session)
        places = find_modulations(session.denoiser, DATA.inputs([0]))
        paths = {path for place in places for path in place.layers}
        layers = {path: layer for path, layer in quantized_layers(session.denoiser).items() if path in paths}
        seen: dict[str, Tensor] = {}
        for path, layer in layers.items():
            layer.register_forward_pre_hook(lambda module, args, path=path: seen.update({path: args[0]}))
        with torch.no_grad(), session.teacher():
            denoise(session.denoiser, DATA.inputs(range(len(DATA))))
            exact = {path: layer(seen[path]) for path, layer in layers.items()}
        with torch.no_grad():
            return {path: relative(exact[path], layer(seen[path])) for path, layer in layers.items()}


def test_smoothing_is_kept_where_it_lowers_the_error_of_a_layer(tmp_path: Path) -> None:
    """P22: with eight bits it helps some layers, with four it helps none, and the check knows which."""
    plain = layer_errors(tmp_path / "plain", "int8", None)
    checked = layer_errors(tmp_path / "checked", "int8", {})
    changed = [path for path in plain if checked[path] != plain[path]]
    assert changed
    assert sum(checked[path] for path in changed) < sum(plain[path] for path in changed)
    plain4 = layer_errors(tmp_path / "plain4", "int4", None)
    assert layer_errors(tmp_path / "checked4", "int4", {}) == plain4
    everywhere = layer_errors(tmp_path / "everywhere4", "int4", {"check": False})
    assert sum(everywhere.values()) > sum(plain4.values())


# -- the recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["weight-ranges", "round-weights", "activation-ranges"])
def test_what_was_found_cannot_be_smoothed_away(first: str) -> None:
    before = ["weight-ranges"] + ([first] if first != "weight-ranges" else [])
    with pytest.raises(UsageError, match="list it before"):
        check_stages([*((name, {}) for name in before), ("smooth-embeddings", {})])


def test_errors_are_measured_last() -> None:
    method = list(qncd.METHOD.stages)
    assert method[-1].name == "measure-errors"
    with pytest.raises(UsageError, match="list it after 'learn-scales'"):
        check_stages([*method, ("learn-scales", {})])
    with pytest.raises(UsageError, match="needs activation scales"):
        check_stages([("weight-ranges", {}), ("measure-errors", {})])


# -- the table ---------------------------------------------------------------------------------------------


def test_the_table_holds_mean_errors_that_are_no_chance() -> None:
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) * 0.1
    timesteps = torch.tensor([10.0, 500.0]).repeat(200)
    bias = torch.where(timesteps[:, None] == 10, torch.tensor([0.3, 0.0]), torch.tensor([0.0, -0.2]))
    table = mean_errors(noise + bias, timesteps, "epsilon", guard=3)
    assert table.timesteps.tolist() == [10, 500]
    assert torch.equal(table.means == 0, torch.tensor([[False, True], [True, False]]))
    assert table.means[0, 0] == pytest.approx(0.3, abs=0.03)
    assert table.means[1, 1] == pytest.approx(-0.2, abs=0.03)
    assert not mean_errors(
        noise[:1] + 5, timesteps[:1], "epsilon", guard=2
    ).means.any()  # one row says nothing


def test_lookups_are_by_the_nearest_timestep() -> None:
    table = CorrectionTable(torch.tensor([1.0, 400.0, 900.0]), torch.tensor([[1.0], [2.0], [3.0]]), "epsilon")
    assert table.nearest(torch.tensor([0, 200, 201, 649.9, 651, 5000])).flatten().tolist() == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert CorrectionTable.from_tensors(table.to_tensors()).prediction == "epsilon"


def test_a_planted_error_is_found(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out", method="minmax") as session:
        run_stages(session)
        planted = torch.tensor([0.5, 0.0, -0.25]).view(1, 3, 1, 1)

        def shifted(module: nn.Module, args: Any, output: Any) -> Any:
            on = next(iter(quantized_layers(module).values())).quantized
            return (output[0] + planted,) if on else output

        session.denoiser.register_forward_hook(shifted)
        qncd.MeasureErrors().run(session)
        table = CorrectionTable.from_tensors(load_file(session.draft.content / "unet" / CORRECTION))
    assert table.means.mean(0).tolist() == pytest.approx([0.5, 0, -0.25], abs=0.02)


# -- the whole way -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("qncd")
    model = ddpm_folder(folder / "model")
    data = collect(model, folder / "set", samples=8, keep=4, steps=5, scheduler="ddim")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "method: qncd\ncoverage: portable\nstages: [smooth-embeddings, migrate-outliers, weight-ranges, "
        "activation-ranges, measure-errors]\n"
    )
    made = calibrate(model, folder / "checkpoint", recipe=recipe, calibration=data)
    assert isinstance(made, Artifact)
    return made


def test_a_loaded_checkpoint_is_smoothed_by_what_was_stored(checkpoint: Artifact) -> None:
    """QNCD-3: the code computes another S when it loads than the one that is in the weights."""
    probe = load_file(checkpoint.file(PROBE))
    inputs = {name.removeprefix("input."): x for name, x in probe.items() if name.startswith("input.")}
    denoiser = load_checkpoint(checkpoint)
    stored = load_file(checkpoint.file("unet/quantized.safetensors"))
    kept = {name.removesuffix(".smoothing"): x for name, x in stored.items() if name.endswith(".smoothing")}
    layers = quantized_layers(denoiser)
    assert kept
    assert all(torch.equal(layers[path].smoothing, x) for path, x in kept.items())  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(denoise(denoiser, inputs), probe["simulated"])


@pytest.mark.slow
def test_the_graph_computes_what_was_smoothed(checkpoint: Artifact, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "onnx")
    graph = onnx.load(bundle.file("unet/model.onnx"))
    makers = {output: node for node in graph.graph.node for output in node.output}
    constants = {value.name: list(value.dims) for value in graph.graph.initializer}
    layers = quantized_layers(load_checkpoint(checkpoint))
    factors: set[str] = set()
    for node in graph.graph.node:
        if node.name in layers:
            dequantize = makers[node.input[0]]
            before = makers[makers[dequantize.input[0]].input[0]]
            layer = layers[node.name]
            assert (before.op_type == "Mul" and before.input[1] in constants) == (layer.smoothing is not None)
            factors |= {before.name} if layer.smoothing is not None else set()
    readers = sum(layer.smoothing is not None for layer in layers.values())
    attentions = len([path for path in layers if path.endswith(".to_k")])
    assert len(factors) == readers - 2 * attentions  # q, k and v share one
    probe = load_file(bundle.file(PROBE))
    session = onnxruntime.InferenceSession(bundle.file("unet/model.onnx"), plain_options())
    rows = []
    for row, simulated in enumerate(probe["simulated"]):
        feeds = {
            "sample": probe["input.sample"][row : row + 1].numpy(),
            "timestep": np.array(float(probe["input.timestep"][row]), np.float32),
        }
        rows.append(sqnr_db(simulated, torch.from_numpy(session.run(None, feeds)[0][0])))
    assert median(rows) >= 45


@pytest.mark.slow
def test_the_table_travels_to_the_engine(checkpoint: Artifact, tmp_path: Path) -> None:
    from qdeploy.engines.build import build_engine

    bundle = export(checkpoint, tmp_path / "onnx")
    engine = build_engine(bundle, tmp_path / "engine", threads=1)
    tables = [read_correction(artifact) for artifact in (checkpoint, bundle, engine)]
    assert all(torch.equal(table.means, tables[0].means) for table in tables)
    assert tables[0].prediction == engine.facts.correction.prediction_type == "epsilon"
    assert tables[0].means.shape == (4, 3)


def test_smoothed_layers_of_several_parts_are_refused_quietly() -> None:
    from qdeploy.calibrate.smoothing import can_smooth

    assert not can_smooth(QuantizedLayer(nn.Conv2d(8, 8, 3, groups=4), int8, int8))
    assert can_smooth(QuantizedLayer(nn.Linear(8, 8), int8, int8))
