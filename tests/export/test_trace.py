"""The graph says what the simulation did: the same numbers, the layers' own names, nothing of the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.calibrate.methods import minmax
from qdeploy.calibrate.session import Session
from qdeploy.export.graph import WEIGHTED_OPS, constant, producer, save
from qdeploy.export.lower import CHANNELS_LAST, PASSES, adapt, lower
from qdeploy.export.trace import OUTPUT, trace
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.quant.state import read_state
from qdeploy.recipe.formats import int4, int8
from qdeploy.system.errors import InvalidInputError
from tests.helpers import MemoryRows, calibrating, codes_of, minmax_layer, plain_options, sqnr_db, tiny_unet

DATA = MemoryRows.noisy()


class Exported:
    """A quantized network, its graph on disk, and the graph's nodes by name."""

    def __init__(self, denoiser: nn.Module, session: Session, path: Path) -> None:
        self.denoiser, self.session, self.path = denoiser, session, path
        self.layers = quantized_layers(denoiser)
        self.state, self.codes = read_state(denoiser), codes_of(denoiser)
        freeze(denoiser)
        self.model = lower(trace(denoiser, DATA.inputs([0, 1])), "portable")
        save(self.model, path)
        self.nodes = {node.name: node for node in self.model.graph}
        self.engine = onnxruntime.InferenceSession(path, plain_options(), providers=["CPUExecutionProvider"])

    def run(self, rows: list[int], timestep: float) -> Tensor:
        inputs = DATA.inputs(rows)
        feeds = {"sample": inputs["sample"].numpy(), "timestep": np.array(timestep, np.float32)}
        return torch.from_numpy(self.engine.run([OUTPUT], feeds)[0])

    def simulate(self, rows: list[int], timestep: float) -> Tensor:
        with torch.no_grad():
            return denoise(self.denoiser, DATA.inputs(rows) | {"timestep": torch.tensor(timestep)})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """W4A8 of a small U-Net: split shortcuts, tied q, k, v, convolutions and linear layers."""
    folder, denoiser = tmp_path_factory.mktemp("trace"), tiny_unet()
    with calibrating(denoiser, DATA, folder / "checkpoint", weights="int4") as session:
        minmax.WeightRanges(finder="lp").run(session)
        minmax.ActivationRanges().run(session)
        for layer in quantized_layers(denoiser).values():
            minmax.round_to_nearest(layer)
        yield Exported(denoiser, session, folder / "model.onnx")


def source(value: ir.Value | None, *operators: str) -> ir.Value | None:
    """Where a value comes from, through nodes of some operators."""
    while (node := producer(value)) is not None and node.op_type in operators:
        value = node.inputs[0]
    return value


def quantizer(value: ir.Value | None) -> ir.Node:
    """The QuantizeLinear that a layer's input passed last."""
    dequantize = producer(value)
    assert dequantize is not None
    assert dequantize.op_type == "DequantizeLinear"
    quantize = producer(dequantize.inputs[0])
    assert quantize is not None
    assert quantize.op_type == "QuantizeLinear"
    return quantize


# -- the same function -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "timestep"), [([0, 1], 999), ([3], 500.5), ([5, 9, 20, 33, 40], 1)])
def test_onnx_runtime_computes_what_torch_simulated(
    exported: Exported, rows: list[int], timestep: float
) -> None:
    """At other batch sizes and timesteps than the traced ones too, fractional ones included."""
    simulated, computed = exported.simulate(rows, timestep), exported.run(rows, timestep)
    assert computed.shape == simulated.shape
    assert sqnr_db(simulated, computed) >= 45


@pytest.mark.slow
def test_the_quantization_shows_in_it(exported: Exported) -> None:
    """Else the test above would pass for a graph without quantizers."""
    with torch.no_grad():
        reference = denoise(tiny_unet(), DATA.inputs([0, 1]) | {"timestep": torch.tensor(999)})
    assert sqnr_db(reference, exported.run([0, 1], 999)) < 30


def weighted(exported: Exported) -> Iterator[tuple[str, int, ir.Node]]:
    """Path, part and node of each quantized layer's products."""
    for path, layer in exported.layers.items():
        for part in range(len(layer.weight_quantizers)):
            yield path, part, exported.nodes[f"{path}/{part}" if layer.split else path]


def test_every_scale_and_every_code_is_that_of_the_checkpoint(exported: Exported) -> None:
    """Bit for bit; a Gemm may read its weight transposed."""
    state = exported.state
    for path, part, node in weighted(exported):
        quantize = quantizer(node.inputs[0])
        layer = exported.layers[path]
        own = layer.input_quantizers[part]
        assert constant(quantize.inputs[1]).tobytes() == own.scale.numpy().tobytes()  # type: ignore[operator]
        assert constant(quantize.inputs[2]).dtype == np.int8
        assert constant(quantize.inputs[2]) == own.zero_point.numpy() == 0  # type: ignore[operator]
        dequantize = producer(source(node.inputs[1], "Transpose"))
        assert dequantize is not None
        assert dequantize.op_type == "DequantizeLinear"
        assert (
            constant(dequantize.inputs[1]).tobytes() == state[f"{path}.weight.{part}.scale"].numpy().tobytes()
        )
        codes = exported.codes[path, part].numpy()
        stored = constant(dequantize.inputs[0])
        assert stored.dtype == np.int8
        assert np.array_equal(stored if dequantize.attributes["axis"].as_int() == 0 else stored.T, codes)


def test_nothing_else_is_quantized(exported: Exported) -> None:
    used = {quantizer(node.inputs[0]).name for _, _, node in weighted(exported)}
    nodes = Counter(node.op_type for node in exported.model.graph)
    assert used == {node.name for node in exported.model.graph if node.op_type == "QuantizeLinear"}
    weights = sum(len(layer.weight_quantizers) for layer in exported.layers.values())
    assert nodes["DequantizeLinear"] == nodes["QuantizeLinear"] + weights
    floats = [
        path for path, module in exported.denoiser.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not path.endswith(".inner")
    ]  # fmt: skip
    for path in floats:
        operands = exported.nodes[path].inputs[:2]
        assert all(getattr(producer(value), "op_type", "") != "DequantizeLinear" for value in operands)


# -- placement ---------------------------------------------------------------------------------------------


def test_a_split_shortcut_is_two_convolutions_on_what_was_before_the_concat(exported: Exported) -> None:
    splits = [path for path, layer in exported.layers.items() if layer.split]
    assert splits
    for path in splits:
        convolutions = [node for node in exported.model.graph if (node.name or "").startswith(f"{path}/")]
        convolutions = [node for node in convolutions if node.op_type == "Conv"]
        assert len(convolutions) == 2
        assert [len([value for value in node.inputs if value]) for node in convolutions] == [3, 2]  # one bias
        read = [quantizer(node.inputs[0]).inputs[0] for node in convolutions]
        concats = [
            node for node in exported.model.graph if node.op_type == "Concat" and list(node.inputs) == read
        ]
        assert len(concats) == 1
        sums = [use.node for node in convolutions for use in node.outputs[0].uses()]
        assert sums[0] is sums[1]
        assert sums[0].op_type == "Add"


def test_no_quantizer_reads_a_concat_and_no_split_is_left(exported: Exported) -> None:
    """An engine would move it before the Concat and merge both scales."""
    for node in exported.model.graph:
        assert node.op_type != "Split"
        if node.op_type == "QuantizeLinear":
            before = producer(node.inputs[0])
            assert before is None or before.op_type != "Concat"


def test_tied_projections_read_one_quantizer(exported: Exported) -> None:
    for path in exported.session.structure.attentions:
        read = [exported.nodes[f"{path}.to_{name}"].inputs[0] for name in "qkv"]
        assert read[0] is read[1] is read[2]


def test_weights_are_dequantized_right_before_they_are_used(exported: Exported) -> None:
    for _, _, node in weighted(exported):
        before = producer(node.inputs[1])
        assert before is not None
        assert before.op_type == "DequantizeLinear"


# -- names and form ----------------------------------------------------------------------------------------


def test_weighted_nodes_are_named_by_their_layers(exported: Exported) -> None:
    modules = {
        path.removesuffix(".inner")
        for path, module in exported.denoiser.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    named = Counter(
        (node.name or "").partition("/")[0] if (node.name or "").partition("/")[0] in modules else None
        for node in exported.model.graph
        if node.op_type in WEIGHTED_OPS
    )
    attention_products = 2 * len(exported.session.structure.attentions)
    assert named.pop(None) == attention_products
    assert named == {
        path: 2 if path in exported.layers and exported.layers[path].split else 1 for path in modules
    }


def test_every_node_has_a_name_of_its_own_that_people_understand(exported: Exported) -> None:
    names = [node.name or "" for node in exported.model.graph]
    assert all(names)
    assert len(set(names)) == len(names)
    assert not any("hook" in name or "inner" in name or name.startswith("denoiser") for name in names)


def test_initializers_of_quantizers_are_named_as_in_the_checkpoint(exported: Exported) -> None:
    initializers = exported.model.graph.initializers
    codes = {name for name in exported.state if name.endswith(".codes")}
    assert codes <= set(initializers)
    assert not any("quantizers" in name or "frozen" in name for name in initializers)


def test_the_file_holds_nothing_of_the_machine(exported: Exported) -> None:
    data = exported.path.read_bytes()
    folders = {Path(module.__file__ or "").parent for module in (qdeploy, torch, onnx)}
    for folder in (*folders, Path.home(), Path.cwd()):
        assert str(folder).encode() not in data
    for word in (b".py", b"site-packages", b"pkg.torch", b"stack_trace"):
        assert word not in data


def test_the_file_is_valid_and_its_batch_is_dynamic(exported: Exported) -> None:
    onnx.checker.check_model(str(exported.path), full_check=True)
    model = onnx.load(exported.path)
    assert [value.name for value in model.graph.input] == ["sample", "timestep"]
    assert [value.name for value in model.graph.output] == [OUTPUT]
    sample, timestep = (value.type.tensor_type for value in model.graph.input)
    assert sample.shape.dim[0].dim_param == "batch"
    assert [axis.dim_value for axis in sample.shape.dim][1:] == [3, 8, 8]
    assert timestep.elem_type == onnx.TensorProto.FLOAT
    assert not timestep.shape.dim
    assert model.opset_import[0].version == 21


def test_one_row_of_inputs_is_enough_for_a_dynamic_batch(tmp_path: Path) -> None:
    """A small calibration set leaves a probe of one row: its graph must not be fixed to batch 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Twins().eval().requires_grad_(False)
    model = lower(
        trace(network, {"sample": torch.ones(1, 3, 8, 8), "timestep": torch.tensor([3])}), "portable"
    )
    save(model, tmp_path / "model.onnx")
    sample = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape
    assert sample.dim[0].dim_param == "batch"


def test_integer_weights_are_stored_as_integers(exported: Exported) -> None:
    """Four-bit codes are int8 in the graph, which engines have kernels for; no float weight is left beside."""
    for name, value in exported.model.graph.initializers.items():
        if any(name.startswith(f"{path}.") for path in exported.layers) and value.shape is not None:
            assert value.dtype == (ir.DataType.INT8 if value.shape.rank() > 1 else value.dtype)
            assert value.shape.rank() > 1 or not name.endswith((".weight", ".codes"))


@pytest.mark.parametrize("target", PASSES)
def test_lowering_again_changes_nothing(exported: Exported, target: str) -> None:
    model = ir.load(exported.path)
    adapt(model, PASSES[target])
    before = Counter(node.op_type for node in model.graph)
    for rewrite in PASSES[target]:
        assert not rewrite()(model).modified
    assert Counter(node.op_type for node in model.graph) == before


def test_a_portable_graph_becomes_one_that_keeps_channels_last(exported: Exported) -> None:
    model = ir.load(exported.path)
    assert adapt(model, CHANNELS_LAST)
    assert "GroupNormalization" not in {node.op_type for node in model.graph}


# -- odd networks ------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two layers with equal weights, one with zeros, and one over a concatenation of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.zero = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.join, self.other = nn.Linear(16, 8), nn.Linear(8, 8)
        self.right.load_state_dict(self.left.state_dict())
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.other.weight)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = sample.flatten(2)[..., :8] + timestep.float().reshape(-1, 1, 1)
        y = self.right(self.left(x).relu())
        y = y + self.zero(y) + self.other(x)
        return (self.join(torch.cat([x, y], dim=-1)),)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_layers_with_equal_weights_keep_their_own_names(tmp_path: Path, quantized: bool) -> None:
    """Exporters merge equal tensors; the layers stay two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = Twins().eval().requires_grad_(False)
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(3.0)}
    if quantized:
        for name in ("left", "right", "zero", "other"):
            setattr(network, name, quantize(getattr(network, name)))
        network.join = quantize(network.join, (8, 8))
        freeze(network)
    model = lower(trace(network, inputs), "portable")
    save(model, tmp_path / "model.onnx")
    layers = sorted(node.name or "" for node in model.graph if node.op_type in WEIGHTED_OPS)
    join = ["join/0", "join/1"] if quantized else ["join"]
    assert layers == sorted(["left", "right", "zero", "other", *join])
    engine = onnxruntime.InferenceSession(tmp_path / "model.onnx", plain_options())
    feeds = {"sample": inputs["sample"].numpy(), "timestep": np.array(3, np.float32)}
    with torch.no_grad():
        assert sqnr_db(denoise(network, inputs), torch.from_numpy(engine.run(None, feeds)[0])) >= 45


def quantize(layer: nn.Module, split: tuple[int, ...] = ()) -> QuantizedLayer:
    quantized = minmax_layer(layer, 3 * torch.randn(50, layer.in_features), int4, int8, split)  # type: ignore[call-overload]
    minmax.round_to_nearest(quantized)
    return quantized


def test_a_network_that_fixes_the_number_of_rows_is_refused() -> None:
    """Chroma makes a tensor from ``[0] * batch_size``: its graph would take two rows and no other number."""

    class Fixes(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            return (sample + torch.tensor([0.0] * sample.shape[0])[:, None],)

    inputs = {"sample": torch.ones(2, 3), "timestep": torch.ones(2)}
    with pytest.raises(InvalidInputError, match="the number of rows a constant"):
        trace(Fixes(), inputs)
