"""QuEST: few weights move, on their grid, and only to the better; the teacher never does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate import learning
from qdeploy.calibrate.methods import minmax, quest
from qdeploy.calibrate.prediction_loss import Losses
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.tuning import StraightThrough, Tuning
from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.trace import OUTPUT, trace
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.network.roles import find_structure
from qdeploy.quant.activation_finders import channel_ranges
from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.checkpoint import load_checkpoint, write_checkpoint
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.quant.state import code_shapes, quantizers, read_state, write_state
from qdeploy.recipe.effort import EFFORTS
from qdeploy.recipe.formats import int4, uint4
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import Stage, check_stages
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.workflows.calibrated_facts import any_attention
from tests.helpers import (
    MemoryRows,
    Stopped,
    calibrating,
    relative,
    same_state,
    some_facts,
    sqnr_db,
    tiny_unet,
)
from tests.models import ddpm_folder
from tests.models.networks import make_two_rows

DATA = MemoryRows.noisy()
STAGES: dict[str, Callable[..., Stage]] = {
    "time": quest.AlignTime,
    "attention": quest.AlignAttention,
    "end": quest.AlignEnd,
}


@contextmanager
def prepared(output: Path, denoiser: nn.Module | None = None, **recipe: Any) -> Iterator[Session]:
    """A session that is ready to align: ranges are found, and roundings are decided, some of them upwards."""
    given = {"weights": "int4", "coverage": "portable-time", **recipe}
    channelwise = given.pop("channelwise", False)
    with calibrating(denoiser or tiny_unet(), DATA, output, **given) as session:
        minmax.WeightRanges(finder="lp").run(session)
        if session.recipe.activations != "none":
            session.stage = "1-ranges"
            minmax.ActivationRanges(channelwise=channelwise).run(session)
        for layer in quantized_layers(session.denoiser).values():
            minmax.round_to_nearest(layer)
            for quantizer, _ in layer.weight_pairs():
                assert quantizer.codes is not None
                codes = quantizer.codes
                codes[:, ::3] = (codes[:, ::3] + 1).clamp(max=quantizer.format.qmax)
                quantizer.codes = codes
        session.stage = "2-align"
        yield session


def weights(session: Session) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in session.denoiser.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {
        name for name in after if name not in before or not torch.equal(before[name], after[name])
    } | before.keys() - after.keys()


def reported(session: Session) -> dict[str, Any]:
    told: dict[str, Any] = session.report["aligned"]["2-align"]
    return told


# -- roles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "attention", "features"),
    [
        ("text_unet", ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"), ("time_emb_proj",)),
        ("dit", ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "linear"), ()),
    ],
    ids=["unet", "dit"],
)
def test_roles_are_found_by_what_layers_do(
    family: str, attention: tuple[str, ...], features: tuple[str, ...]
) -> None:
    """What they are called serves to say here what was expected."""
    structure = find_structure(*make_two_rows(family))
    found = {layer.path for layer in structure.layers if layer.attention}
    blocks = {layer.path for layer in structure.layers if "transformer_blocks" in layer.path}
    expected = {path for path in blocks if path.endswith(attention) and "timestep_embedder" not in path}
    assert expected <= found <= blocks
    assert not any(structure[path].temporal for path in found)
    assert all(path.endswith(features) for path in structure.time.features if features)


def test_a_network_without_attention_has_nothing_critical(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import UNet2DModel

    plain = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    with prepared(tmp_path / "out", plain) as session:
        before = read_state(session.denoiser)
        quest.AlignAttention().run(session)
        assert not changed(before, read_state(session.denoiser))
    assert "align-attention has nothing to align" in capsys.readouterr().err


def test_a_time_path_in_float_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with prepared(tmp_path / "out", coverage="portable") as session:
        before = weights(session), read_state(session.denoiser)
        quest.AlignTime().run(session)
        assert not changed(before[0], weights(session))
        assert not changed(before[1], read_state(session.denoiser))
    assert "coverage portable" in capsys.readouterr().err


def test_alignment_before_ranges_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs activation scales: list one of .*activation-ranges"):
        check_stages([("weight-ranges", {}), ("align-time", {}), ("activation-ranges", {})])


@pytest.mark.parametrize(
    "option", [{"reach": -1.0}, {"reach_scales": -0.1}, {"local": float("nan")}, {"micro_batch": 0}]
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with prepared(tmp_path / "out") as session, pytest.raises(UsageError, match=r"cannot be|at least one"):
        quest.AlignAttention(**option).run(session)


# -- what moves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("nothing", [{"steps": 0}, {"steps": 2, "reach": 0.0, "reach_scales": 0.0}])
def test_no_step_and_no_reach_leave_every_code_and_scale(
    tmp_path: Path, stage: str, nothing: dict[str, Any]
) -> None:
    """P12; and QUEST-9's cousin: a weight that begins anywhere else than at its decided code would lose it."""
    with prepared(tmp_path / "out") as session:
        before = read_state(session.denoiser)
        STAGES[stage](**nothing).run(session)
        different = changed(before, read_state(session.denoiser))
    assert not {name for name in different if not name.endswith((".tuned", ".tuned_bias"))}
    assert reported(session)["changed_codes"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_only_weights_of_the_role_move_and_the_teacher_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """P12 and P13: others keep codes and scales; weight scales are frozen everywhere."""
    monkeypatch.setattr(Losses, "judged", lambda *args: 1.0)  # keep whatever comes
    with prepared(tmp_path / "out") as session:
        teacher, before = digest(session), read_state(session.denoiser)
        STAGES[stage](steps=3, reach=3.0, reach_scales=0.5).run(session)
        after = read_state(session.denoiser)
        assert digest(session) == teacher
    features = set(session.structure.time.features)
    attention = {layer.path for layer in session.layers if layer.attention}
    end = {layer.path for layer in list(session.units.values())[-1]}
    assert end
    assert not end & attention
    role = {"time": features, "attention": attention, "end": end}[stage]
    scaled = role if stage != "attention" else {layer.path for layer in session.layers} - features
    for name in changed(before, after):
        path = name.partition(".weight.")[0].partition(".input.")[0]
        path = path.removesuffix(".tuned").removesuffix(".tuned_bias")
        if ".input." in name:
            assert name.endswith(".scale")
            assert path in scaled
        else:
            assert name.endswith((".codes", ".tuned", ".tuned_bias"))
            assert path in role
    assert any(name.endswith(".codes") for name in changed(before, after))
    assert any(".input." in name for name in changed(before, after))


def digest(session: Session) -> str:
    """Of what the network gives in full precision, and of its weights."""
    found = hashlib.sha256()
    with torch.no_grad(), session.teacher():
        found.update(denoise(session.denoiser, DATA.inputs(range(4))).numpy().tobytes())
    for tensor in weights(session).values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def test_rounding_follows_a_weight_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QUEST-9: decisions that stay while a weight crosses to another code push it the wrong way."""
    monkeypatch.setattr(Losses, "judged", lambda *args: 1.0)
    with prepared(tmp_path / "out") as session:
        quest.AlignAttention(steps=3, reach=4.0).run(session)
        moved = [layer for layer in quantized_layers(session.denoiser).values() if layer.tuned is not None]
    assert reported(session)["changed_codes"] > 0
    for layer in moved:
        for quantizer, tuned in layer.weight_pairs():
            assert torch.equal(quantizer.codes, quantizer.nearest(tuned))


@pytest.mark.parametrize("number_format", [int4, uint4])
def test_codes_stay_on_their_grid_wherever_a_weight_goes(number_format: Any) -> None:
    """P6."""
    quantizer = WeightQuantizer(number_format, 3)
    quantizer.set(torch.tensor([0.1, 1.0, 7.0]), torch.full((3,), int(not number_format.symmetric) * 5))
    quantizer.codes = torch.full((3, 4), number_format.qmax, dtype=torch.int16)
    grid = StraightThrough(quantizer)
    with torch.no_grad():
        grid.u.copy_(torch.tensor([-1e4, -0.4, 0.6, 1e4]).expand(3, 4))
    codes = grid.codes()
    assert number_format.qmin <= codes.min()
    assert codes.max() <= number_format.qmax
    quantizer.codes = codes
    assert torch.equal(grid(), quantizer(None))
    assert not grid()[:, 1].any()  # zero is a code of its own


def test_scales_stay_positive_and_zero_stays_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6 for activations: steps that are learned as they are can cross zero under a wild rate."""
    monkeypatch.setattr(Losses, "judged", lambda *args: 1.0)
    with prepared(tmp_path / "out", activations="uint8", target="openvino") as session:
        quest.AlignAttention(steps=2, reach_scales=8.0).run(session)
    for _, quantizer in quantizers(session.denoiser):
        if isinstance(quantizer, ActivationQuantizer):
            assert quantizer.scale > 0
            assert 0 <= quantizer.zero_point <= 255
            assert quantizer(torch.zeros(2, 3)).eq(0).all()


# -- kept only if better -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [40.0, torch.nan])
def test_what_worsens_the_prediction_is_put_back_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    """P13. The reference code keeps whatever its last epoch left."""

    def diverge(session: Session, tuning: Tuning, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in tuning.parameters().values():
                parameter.add_(bad)

    monkeypatch.setattr(quest, "learn", diverge)
    with prepared(tmp_path / "out") as session:
        before = read_state(session.denoiser)
        quest.AlignAttention().run(session)
        assert not changed(before, read_state(session.denoiser))
    assert not reported(session)["kept"]
    assert "everything is as it was" in capsys.readouterr().err


@pytest.mark.slow
def test_alignments_lower_the_error_on_images_that_nothing_was_learned_from_or_are_put_back(
    tmp_path: Path,
) -> None:
    with prepared(tmp_path / "out") as session:
        rows = [session.rows()[i] for i in session.split(session.rows())[1].tolist()]
        errors = [prediction_error(session, rows)]
        for number, (align, steps) in enumerate(zip(STAGES.values(), (12, 12, 50), strict=True)):
            session.stage = f"{number}-align"
            align(steps=steps).run(session)
            errors.append(prediction_error(session, rows))
    kept = [session.report["aligned"][f"{number}-align"]["kept"] for number in range(3)]
    # Which of so few steps help depends on the last bits, and so on the processor.
    assert sum(kept) >= 2
    assert all(
        after < before if k else after == before
        for k, (before, after) in zip(kept, pairwise(errors), strict=True)
    )
    assert 0 < session.report["aligned"]["0-align"]["share"] < 0.1


def test_the_end_is_tuned_against_the_prediction_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit's own error says nothing of what reads it."""
    seen: list[tuple[float, float]] = []

    def see(self: Losses, rows: Sequence[int]) -> Tensor:
        seen.append((self.local, self.overall))
        return stock(self, rows)

    stock = Losses.__call__
    monkeypatch.setattr(Losses, "__call__", see)
    with prepared(tmp_path / "out") as session:
        quest.AlignEnd(steps=2).run(session)
    assert set(seen) == {(0.0, 1.0)}


def prediction_error(session: Session, rows: Sequence[int]) -> float:
    inputs = DATA.inputs(rows)
    with torch.no_grad():
        quantized = denoise(session.denoiser, inputs)
        with session.teacher():
            return relative(denoise(session.denoiser, inputs), quantized)


# -- gradients ---------------------------------------------------------------------------------------------


def gradients(session: Session, recompute: bool, micro_batch: int = 8) -> dict[str, Tensor]:
    layers = quest.layers_at(session, [layer.path for layer in session.layers if layer.attention])
    losses = Losses(session, list(layers), 1.0, 2.0, recompute)
    tuned = Tuning(layers, quest.input_scales(session))
    rows = list(range(8))
    with tuned.installed():
        for start in range(0, len(rows), micro_batch):
            part = rows[start : start + micro_batch]
            (losses(part) * (len(part) / len(rows))).backward()
    return {name: p.grad for name, p in tuned.parameters().items() if p.grad is not None}


@pytest.mark.parametrize(
    "recipe",
    [
        {"timestep_groups": 2},
        {"coverage": "qdiffusion-paper", "weights": "uint4", "activations": "uint8", "target": "simulated"},
    ],
    ids=["groups", "attention"],
)
def test_memory_is_bounded_and_the_gradient_the_same(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Units that are computed again see the timestep of their call, and attend with their quantizers."""
    with prepared(tmp_path / "out", **recipe) as session:
        kept: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.numel()
            return tensor

        found = []
        for recompute, micro_batch in ((False, 8), (True, 8), (True, 4)):
            kept.append(0)
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                found.append(gradients(session, recompute, micro_batch))
    assert kept[1] < kept[0] / 2
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, other[name], rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))


def test_every_group_of_timesteps_learns_its_scale(tmp_path: Path) -> None:
    """QUEST-2 and QUEST-7: a step that is not found leaves the scales of another, and one entry gets all the data."""
    with prepared(tmp_path / "out", timestep_groups=2) as session:
        found = gradients(session, recompute=True)
        banked = [name for name, q in quest.input_scales(session).items() if q.banked]
    assert banked
    assert all(found[f"{name}.log"].shape == (2,) for name in banked)
    learned = torch.stack([found[f"{name}.log"] for name in banked])
    assert learned.ne(0).any(0).all()


def test_one_scale_serves_all_timesteps_unless_the_recipe_says_else(tmp_path: Path) -> None:
    """The paper's claim, where the code keeps one for each timestep."""
    with prepared(tmp_path / "out") as session:
        quest.AlignAttention(steps=1).run(session)
    assert not any(quantizer.banked for quantizer in quest.input_scales(session).values())


def test_dropout_is_off_while_weights_are_tuned(tmp_path: Path) -> None:
    """QUEST-11."""
    modes: list[bool] = []
    with prepared(tmp_path / "out") as session:
        for module in session.denoiser.modules():
            if isinstance(module, nn.Dropout) and module.p:
                module.register_forward_hook(lambda module, *_: modes.append(module.training))
        quest.AlignAttention(steps=1).run(session)
    assert modes
    assert not any(modes)


# -- again -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_stopped_alignment_goes_on_at_its_step_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stages of three steps; QUEST-10: what is done is not done again."""
    stock, made, limit = Losses.__call__, 0, stop

    def counting(self: Losses, rows: Sequence[int]) -> Tensor:
        nonlocal made
        if made == limit:
            raise Stopped
        made += 1
        return stock(self, rows)

    def run(output: Path) -> Session:
        with prepared(output) as session:
            for number, align in enumerate(STAGES.values()):
                session.stage = f"{number + 2}-align"
                align(steps=3, micro_batch=12).run(session)
        return session

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(Losses, "__call__", counting)
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    with pytest.raises(Stopped):
        run(tmp_path / "out")
    limit = -1
    again = run(tmp_path / "out")
    assert made == 9
    assert same_state(whole, again)
    assert whole.report["aligned"] == again.report["aligned"]


def test_a_tuned_checkpoint_needs_no_calibration_data(tmp_path: Path) -> None:
    """P14: what is loaded gives the same bits at every timestep, scales of q, k, v and softmax included."""
    model = open_model(ddpm_folder(tmp_path / "ddpm"))
    recipe = {"coverage": "qdiffusion-paper", "weights": "uint4", "target": "simulated"}
    with prepared(tmp_path / "out", model.load(), **recipe) as session:
        quest.AlignTime(steps=2).run(session)
        session.stage = "3-align"
        quest.AlignAttention(steps=2).run(session)
        assert any_attention(session)
        write_checkpoint(
            session.draft, model, session.denoiser, session.layers, list(session.structure.attentions)
        )
        artifact = session.draft.finish(some_facts(component=model.name))
    inputs = DATA.inputs(range(8))
    with torch.no_grad():
        expected = denoise(session.denoiser, inputs)
        assert torch.equal(denoise(load_checkpoint(artifact), inputs), expected)


@pytest.mark.slow
def test_the_graph_of_a_tuned_network_computes_what_torch_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Losses, "judged", lambda *args: 1.0)
    with prepared(tmp_path / "out") as session:
        untuned = predicted(session.denoiser)
        quest.AlignTime(steps=3, reach=3.0).run(session)
        session.stage = "3-align"
        quest.AlignAttention(steps=3, reach=3.0).run(session)
    simulated = predicted(session.denoiser)
    freeze(session.denoiser)
    save(lower(trace(session.denoiser, DATA.inputs([0, 1])), "portable"), tmp_path / "model.onnx")
    engine = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"sample": DATA.inputs(range(6))["sample"].numpy(), "timestep": np.array(500, np.float32)}
    computed = torch.from_numpy(engine.run([OUTPUT], feeds)[0])
    rows = [sqnr_db(one, other) for one, other in zip(simulated, computed, strict=True)]
    assert np.median(rows) >= 45
    assert sqnr_db(untuned, computed) < 40  # tuning shows


def predicted(denoiser: nn.Module) -> Tensor:
    with torch.no_grad():
        return denoise(denoiser, DATA.inputs(range(6)) | {"timestep": torch.tensor(500.0)})


def test_the_method_runs_from_end_to_end(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out", method="quest", weights="int4") as session:
        run_stages(session)
    assert session.recipe.coverage == "portable-time"
    assert len(session.report["aligned"]) == 2
    layers = quantized_layers(session.denoiser).values()
    assert all(
        layer.tuned is None and quantizer.codes is not None
        for layer in layers
        for quantizer, _ in layer.weight_pairs()
    )


def test_tuning_grows_with_the_effort() -> None:
    assert (
        EFFORTS["fast"].tuning
        < EFFORTS["balanced"].tuning
        < EFFORTS["thorough"].tuning
        < EFFORTS["best"].tuning
    )


# -- channels ----------------------------------------------------------------------------------------------


def test_ranges_of_channels_do_not_depend_on_how_often_they_are_seen() -> None:
    """P8, QUEST-6: the reference's running statistics mix the last channel's scalar into all the others."""
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 30.0, 0.01]
    ).view(3, 1, 1)
    once, often = ActivationStatistics(axis=1), ActivationStatistics(axis=1)
    once.observe(x)
    for _ in range(5):
        often.observe(x)
    for finder in ("minmax", "lp"):
        for one, other in zip(*(channel_ranges(seen, finder, uint4) for seen in (once, often)), strict=True):
            assert one.shape == (3,)
            assert torch.equal(one, other)
    scale, zero_point = channel_ranges(once, "minmax", uint4)
    low, high = (x.transpose(0, 1).flatten(1).amin(1), x.transpose(0, 1).flatten(1).amax(1))
    assert torch.allclose(scale, (high - low) / 15)
    assert torch.all((zero_point >= 0) & (zero_point <= 15))


@pytest.mark.parametrize("groups", [1, 2])
def test_each_input_channel_has_a_scale_of_its_own_which_no_engine_runs(tmp_path: Path, groups: int) -> None:
    recipe = {"activations": "uint4", "target": "simulated", "timestep_groups": groups}
    errors = []
    for channelwise in (False, True):
        output = tmp_path / str(channelwise)
        with prepared(output, channelwise=channelwise, **recipe) as session:
            errors.append(prediction_error(session, range(16)))
            if channelwise:
                quest.AlignAttention(steps=1).run(session)
                again = read_state(session.denoiser)
                write_state(session.denoiser, again, code_shapes(session.denoiser))
                assert not changed(again, read_state(session.denoiser))
    assert errors[1] < errors[0]
    for layer in quantized_layers(session.denoiser).values():
        sizes = layer.split or (layer.weight.shape[1],)
        for quantizer, size in zip(layer.activation_quantizers, sizes, strict=True):
            assert quantizer.axis == layer.feature_axis
            assert quantizer.scale.shape[-1] == size
            assert quantizer.banked == (groups > 1)
    with pytest.raises(CapabilityError, match="simulation"):
        freeze(session.denoiser)


def test_scales_by_channel_are_refused_for_engines_and_for_other_finders(tmp_path: Path) -> None:
    stages = (("weight-ranges", {}), ("activation-ranges", {"channelwise": True}))
    with pytest.raises(UsageError, match="no engine has a scale for each input channel"):
        resolve_recipe(stages=stages)
    assert resolve_recipe("w4a4-quest").simulated()
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        minmax.WeightRanges().run(session)
        with pytest.raises(UsageError, match="minmax, lp"):
            minmax.ActivationRanges(finder="percentile", channelwise=True).run(session)
