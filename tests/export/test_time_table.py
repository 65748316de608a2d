"""Temporal features from a table: nothing of the time path is left, and nothing else has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdeploy.calibration_set.collect import collect
from qdeploy.evaluate.parity import open_subject
from qdeploy.export.graph import WEIGHTED_OPS, save
from qdeploy.export.lower import lower
from qdeploy.export.run import export
from qdeploy.export.time_table import TimeTable, needs_table, plan_table, tabulate
from qdeploy.export.trace import OUTPUT, trace
from qdeploy.model.folder import Model, open_model
from qdeploy.model.inputs import denoise
from qdeploy.network.roles import find_structure
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.feature_table import STORAGES, FeatureTable
from qdeploy.quant.layer import quantized_layers
from qdeploy.store.artifact import Artifact, Bundle, open_artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.workflows.calibrate import calibrate
from tests.helpers import Stopped, relative
from tests.models import ddpm_folder, make

ALL = torch.arange(1000)
SOME = np.linspace(0, 999, 25).round().tolist()
FAMILIES = ("unet", "text_unet", "class_unet", "sdxl_unet", "dit", "pixart")
RECIPE = """
method: tfmq
stages:
  - weight-ranges
  - activation-ranges
  - finite-set-ranges
  - temporal-selection: {mode: MODE}
weights: int4
activations: uint8
target: openvino
effort: fast
"""


def two_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


def tabled(family: str, storage: str, rows: Tensor = ALL) -> tuple[nn.Module, dict[str, Tensor], int]:
    network, inputs = make(family)
    return network, inputs, tabulate(network, inputs, TimeTable(storage, rows, None))


# -- the table itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds_every_feature_of_every_timestep(family: str) -> None:
    """Bit for bit, for all 1000 of the two that differ most; and features' layers are gone."""
    network, inputs = make(family)
    time = find_structure(network, inputs).time
    timesteps = ALL if family in ("unet", "dit") else ALL[::50]
    with torch.no_grad():
        expected = time(network, timesteps)
    size = tabulate(network, inputs, TimeTable("fp32", timesteps, None))
    for name, value in expected.items():
        table = network.get_submodule(name)
        assert isinstance(table, FeatureTable)
        assert torch.equal(table.values(), value)
    assert size == sum(4 * value.numel() + 4 * (len(timesteps) - 1) for value in expected.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_computes_the_same_with_it(family: str, storage: str) -> None:
    """P4: fp32 exactly; fp16 and int8 as near as their rounding."""
    network, inputs = make(family)
    deployed = torch.tensor([0, 1, 437, 999])
    other = tabled(family, storage, deployed)[0]
    tolerance = {"auto": 1e-3, "fp32": 1e-6, "fp16": 1e-3, "int8": 3e-2}[storage]
    for timestep in deployed.tolist():
        given = inputs | {"timestep": torch.tensor([timestep])}
        with torch.no_grad():
            assert relative(denoise(network, given), denoise(other, given)) <= tolerance


def test_smaller_storage_is_smaller() -> None:
    sizes = [tabled("unet", storage, ALL[::10])[2] for storage in ("fp32", "fp16", "int8")]
    assert tabled("unet", "auto", ALL[::10])[2] == sizes[1]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_features_that_fp16_cannot_hold_are_refused() -> None:
    network, inputs = make("unet")
    network.get_submodule("mid_block.resnets.0.time_emb_proj").bias.fill_(1e6)  # type: ignore[operator, union-attr]
    with pytest.raises(UsageError, match="exceed what fp16 holds"):
        tabulate(network, inputs, TimeTable("fp16", ALL[::100], None))


@pytest.mark.parametrize("value", [1e6, 1e-7, float("nan")])
def test_where_fp16_is_not_exact_enough_auto_keeps_floats(value: float) -> None:
    features = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    assert FeatureTable.stored(features, torch.zeros(6), None, "auto").rows.dtype == torch.float16
    features[3] = value
    assert FeatureTable.stored(features, torch.zeros(6), None, "auto").rows.dtype == torch.float32


def test_a_network_without_temporal_features_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (self.body(sample),)

    inputs = {"sample": torch.ones(1, 4), "timestep": torch.tensor([5])}
    with pytest.raises(UsageError, match="nothing in this network depends on the timestep alone"):
        tabulate(Plain(), inputs, TimeTable("fp32", ALL, None))


# -- what is asked for -------------------------------------------------------------------------------------


def test_rows_are_all_of_training_or_a_schedules(ddpm: Path) -> None:
    model = open_model(ddpm)
    assert torch.equal(plan_table(model, "fp32").timesteps, ALL)
    ddim = plan_table(model, "int8", "ddim:20")
    assert ddim.timesteps.tolist() == list(range(0, 1000, 50))
    assert ddim.facts(7).to_json() == {
        "storage": "int8",
        "schedule": "ddim:20",
        "rows": ddim.timesteps.tolist(),
        "bytes": 7,
    }
    assert plan_table(model, "fp32").facts(7).rows is None
    assert len(plan_table(model, "fp32", "dpm++:10").timesteps) == 10


@pytest.mark.parametrize(
    ("storage", "rows", "words"),
    [
        ("fp8", "all", "unknown storage of a time table 'fp8'"),
        ("fp32", "nonsense", "'nonsense'"),
        ("fp32", "ddim:", "'ddim:'"),
        ("fp32", "ddim:0", "'ddim:0'"),
        ("fp32", "ddim:-3", "'ddim:-3'"),
        ("fp32", ":20", "':20'"),
        ("fp32", "abacus:20", "unknown scheduler 'abacus'"),
    ],
)
def test_what_makes_no_sense_is_refused(ddpm: Path, storage: str, rows: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_table(open_model(ddpm), storage, rows)


def test_more_steps_than_the_schedule_has_are_refused(ddpm: Path) -> None:
    with pytest.raises(UsageError, match="ddim:1001"):
        plan_table(open_model(ddpm), "fp32", "ddim:1001")


def test_a_denoiser_alone_needs_a_schedule_to_be_named(ddpm: Path) -> None:
    with pytest.raises(UsageError, match="no scheduler that states"):
        plan_table(open_model(ddpm / "unet"), "fp32")


# -- in the graph ------------------------------------------------------------------------------------------


class Graph:
    """A network's graph with a table, in ONNX Runtime."""

    def __init__(self, family: str, storage: str, folder: Path) -> None:
        self.network, self.inputs = make(family)
        self.time = find_structure(self.network, self.inputs).time
        self.tabled = tabled(family, storage)[0]
        self.model = lower(trace(self.tabled, two_rows(self.inputs)), "portable")
        save(self.model, folder / "model.onnx")
        self.engine = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(self, timestep: float) -> Tensor:
        feeds = {name: value.numpy() for name, value in self.inputs.items()}
        feeds["timestep"] = np.array(timestep, np.float32)
        return torch.from_numpy(self.engine.run([OUTPUT], feeds)[0])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("unet", "fp32"), marks=pytest.mark.slow, id="unet-fp32"),
        pytest.param(("dit", "fp16"), id="dit-fp16"),
    ],
)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(*request.param, tmp_path_factory.mktemp("graph"))


def nothing_of_the_time_path(model: ir.Model, layers: tuple[str, ...]) -> None:
    for node in model.graph:
        if node.op_type in WEIGHTED_OPS:
            assert not (node.name or "").startswith(layers), node.name
        assert node.op_type not in ("Sin", "Cos")
    for name in model.graph.initializers:
        assert not name.startswith(tuple(f"{path}.{what}" for path in layers for what in ("weight", "bias")))


@pytest.mark.slow
def test_no_layer_of_the_time_path_is_left(graph: Graph) -> None:
    """Neither by the nodes' names nor by the weights' names, nor the sinusoids."""
    nothing_of_the_time_path(graph.model, graph.time.layers)
    gathered = {
        node.inputs[0].name for node in graph.model.graph if node.op_type == "Gather" and node.inputs[0]
    }
    assert {f"{name}.rows" for name in graph.time.features} <= gathered


@pytest.mark.slow
def test_no_weight_of_the_time_path_is_left_under_another_name(graph: Graph) -> None:
    left = [
        value.const_value.numpy() for value in graph.model.graph.initializers.values() if value.const_value
    ]
    for path in graph.time.layers:
        weight = graph.network.get_submodule(path).weight.numpy()  # type: ignore[operator, union-attr]
        for other in left:
            same = (weight.shape, weight.T.shape)
            assert other.shape not in same or not np.array_equal(
                other, weight if other.shape == same[0] else weight.T
            )


def test_all_tables_of_a_graph_are_looked_up_once(graph: Graph) -> None:
    """The place of the timestep among the rows: one comparison with the edges, whatever the tables."""
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds.count("Greater") == 1
    assert sum(name.endswith(".edges") for name in graph.model.graph.initializers) == 1


def test_onnx_runtime_computes_the_networks_own_function(graph: Graph) -> None:
    """P4, end to end on timesteps of training: beside the network that still computes its time path."""
    with torch.no_grad():
        for timestep in SOME:
            given = graph.inputs | {"timestep": torch.tensor([timestep])}
            if graph.tabled.get_submodule(graph.time.features[0]).rows.dtype == torch.float16:  # type: ignore[union-attr]
                assert relative(denoise(graph.network, given), graph.run(timestep)) < 1e-3
                assert relative(denoise(graph.tabled, given), graph.run(timestep)) <= 2e-6
            else:
                assert relative(denoise(graph.network, given), graph.run(timestep)) <= 2e-6


# -- of a checkpoint ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of few timesteps."""
    folder = ddpm_folder(tmp_path_factory.mktemp("model") / "ddpm")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 200'))
    return folder


@pytest.fixture(scope="module")
def data(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    collect(trained, folder, samples=4, keep=4, steps=20, scheduler="ddim")
    return folder


def checkpoint_of(trained: Path, data: Path, folder: Path, mode: str) -> Artifact:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("MODE", mode))
    made = calibrate(trained, folder / "checkpoint", recipe=recipe, calibration=data)
    assert isinstance(made, Artifact)
    return made


@pytest.fixture(scope="module")
def checkpoint(trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A range with a zero point for every timestep in the time path, and quantized tables of its features."""
    return checkpoint_of(trained, data, tmp_path_factory.mktemp("cache"), "cache")


@pytest.fixture(scope="module")
def bundle(checkpoint: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its export, with the rows of one schedule."""
    folder = tmp_path_factory.mktemp("bundle") / "onnx"
    return export(checkpoint, folder, time_table="int8", table_rows="ddim:20")


def test_without_a_table_zero_points_that_move_are_refused_in_one_sentence(
    checkpoint: Artifact, tmp_path: Path
) -> None:
    assert needs_table(load_checkpoint(checkpoint))
    with pytest.raises(UsageError, match="choose --time-table auto, fp32") as refused:
        export(checkpoint, tmp_path / "onnx", time_table="none")
    assert "\n" not in str(refused.value)
    assert "zero point for each timestep" in str(refused.value)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_the_manifest_says_what_the_table_is(checkpoint: Artifact, bundle: Artifact) -> None:
    facts = open_artifact(bundle.path, Bundle).facts
    table = facts.time_table
    assert table is not None
    assert (table.storage, table.schedule) == ("int8", "ddim:20")
    assert table.rows == list(range(0, 200, 10))
    assert table.bytes > 0
    assert facts.timesteps is not None
    assert facts.timesteps == checkpoint.facts.timesteps
    assert (facts.timesteps.low, facts.timesteps.high) == (0.0, 199.0)


@pytest.mark.slow
def test_codes_that_calibration_stored_are_in_the_graph_bit_for_bit(
    checkpoint: Artifact, bundle: Artifact
) -> None:
    state = load_file(checkpoint.file("unet/quantized.safetensors"))
    graph = ir.load(bundle.file("unet/model.onnx"))
    names = [name for name in state if name.endswith(".feature.rows")]
    assert len(names) == 8
    for name in names:
        path = name.removesuffix(".feature.rows")
        stored = graph.graph.initializers[f"{path}.rows"].const_value
        assert stored is not None
        assert stored.numpy().dtype == np.uint8
        assert np.array_equal(stored.numpy(), state[name][::10].numpy())


def test_nothing_of_the_quantized_time_path_is_left(checkpoint: Artifact, bundle: Artifact) -> None:
    graph = ir.load(bundle.file("unet/model.onnx"))
    layers = tuple(quantized_layers(load_checkpoint(checkpoint)))
    temporal = tuple(path for path in layers if "time_emb" in path)
    assert len(temporal) == 10
    nothing_of_the_time_path(graph, temporal)
    named = {(node.name or "").partition("/")[0] for node in graph.graph if node.op_type in WEIGHTED_OPS}
    assert set(layers) - set(temporal) <= named


def test_the_bundle_computes_what_the_checkpoint_simulates(checkpoint: Artifact, bundle: Artifact) -> None:
    """In ONNX Runtime, at every row of the schedule; the median over rows, since codes on an edge may flip."""
    subject, reference = open_subject(bundle), open_subject(checkpoint)
    timesteps = torch.arange(0, 200, 10)
    sample = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"sample": sample, "timestep": timesteps}
    mine, theirs = subject.predict(inputs), reference.predict(inputs)
    errors = (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    assert errors.median() < 10 ** (-45 / 20)


@pytest.mark.parametrize("timestep", [5.0, 191.0, 199.0])
def test_a_timestep_outside_of_the_schedule_is_refused(bundle: Artifact, timestep: float) -> None:
    subject = open_subject(bundle)
    inputs = {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.tensor([timestep])}
    with pytest.raises(InvalidInputError, match=f"ddim:20 and has no row for timestep {timestep:g}"):
        subject.predict(inputs)
    assert subject.predict(inputs | {"timestep": torch.tensor([190.0])}).isfinite().all()


def test_a_table_of_a_quantized_block_holds_what_the_block_computes(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    """Where the block was chosen, the table stands for the quantized block, not for the float one."""
    checkpoint = checkpoint_of(trained, data, tmp_path, "block")
    denoiser = load_checkpoint(checkpoint)
    inputs = {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.tensor([40])}
    time = find_structure(denoiser, inputs).time
    timesteps = torch.tensor([0, 40, 199])
    with torch.no_grad():
        expected = time(denoiser, timesteps)
        exact = time(open_model(trained).load(), timesteps)
    tabulate(denoiser, inputs, TimeTable("fp32", timesteps, None))
    for name, value in expected.items():
        table: Any = denoiser.get_submodule(name)
        assert torch.equal(table.values(), value)
        assert not torch.equal(value, exact[name])


def test_by_default_a_calibrated_time_path_becomes_a_table(
    checkpoint: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a static one stays; what the default comes to is decided before any work."""
    from qdeploy.export import run

    planned: list[TimeTable] = []

    def plan_and_stop(model: Model, *options: Any) -> TimeTable:
        planned.append(plan_table(model, *options))
        raise Stopped

    monkeypatch.setattr(run, "plan_table", plan_and_stop)
    with pytest.raises(Stopped):
        export(checkpoint)
    assert planned[0].storage == "auto"
    assert len(planned[0].timesteps) == 200
