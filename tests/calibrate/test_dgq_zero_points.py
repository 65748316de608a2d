"""Groups have zero points of their own, on q, k and v too; what a deployable form cannot hold is counted and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdeploy.calibrate.groups import CHANNELS, relative_spans
from qdeploy.calibrate.input_groups import set_group_scales
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.operators import to_grid
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import to_scale
from qdeploy.recipe.formats import int8, uint6, uint8
from qdeploy.system.decibels import decibels
from tests.helpers import MemoryRows, calibrating, tiny_unet

DATA = MemoryRows.noisy(images=6)


def behind_silu() -> Tensor:
    """[N, C] outputs of SiLU, whose channels reach 0.3 to 40 upwards, and all equally far down."""
    generator = torch.Generator().manual_seed(0)
    reach = torch.logspace(-0.5, 1.6, 16)
    x = torch.nn.functional.silu(torch.randn(4000, 16, generator=generator) * reach / 3)
    x[0] = torch.nn.functional.silu(torch.tensor(-1.278))  # all channels touch the lowest value
    return x


def grouped(x: Tensor, labels: Tensor, number_format: Any) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(number_format)
    quantizer.set(*to_scale(x.min(), x.max(), number_format))
    found = {f"{CHANNELS}.low": x.amin(0), f"{CHANNELS}.high": x.amax(0)}
    set_group_scales(quantizer, found, CHANNELS, labels, -1)
    return quantizer


def noise(x: Tensor, quantized: Tensor) -> float:
    return decibels(float(x.square().sum()), float((x - quantized).square().sum()))


@pytest.mark.parametrize("number_format", [uint6, uint8], ids=lambda f: f.name)
def test_each_group_is_quantized_as_if_it_were_a_tensor_of_its_own(number_format: Any) -> None:
    """DGQ, section 4: s_g = (high_g - low_g) / (2^b - 1), z_g = round(-low_g / s_g)."""
    x, labels = behind_silu(), torch.arange(16) // 4
    quantizer = grouped(x, labels, number_format)
    for group in range(4):
        own = labels == group
        scale, zero_point = to_scale(x[:, own].min(), x[:, own].max(), number_format)
        torch.testing.assert_close(quantizer.scale[own], scale.expand(4), rtol=1e-5, atol=0)
        assert torch.equal(quantizer.zero_point[own], zero_point.expand(4))


def test_behind_silu_a_scale_without_a_zero_point_gains_nothing_and_with_one_much() -> None:
    x, labels = behind_silu(), torch.arange(16) // 2
    spans = relative_spans(x.amin(0), x.amax(0), labels, symmetric=False)
    assert (spans > 0.999).all()
    plain = to_grid(x, *to_scale(x.min(), x.max(), uint6), uint6)
    narrow = x[:, :8]
    assert noise(narrow, grouped(x, labels, uint6)(x)[:, :8]) > noise(narrow, plain[:, :8]) + 10


def test_symmetric_groups_keep_their_zero_point() -> None:
    quantizer = grouped(behind_silu(), torch.arange(16) // 4, int8)
    assert not quantizer.zero_point.any()


def test_zero_is_exact_in_every_group() -> None:
    x = behind_silu() + torch.linspace(-3, 3, 16)  # some groups never see zero
    quantizer = grouped(x, torch.arange(16) // 4, uint8)
    assert ((quantizer.zero_point >= 0) & (quantizer.zero_point <= 255)).all()
    assert not quantizer(torch.zeros(2, 16)).any()


def test_groups_of_timesteps_have_the_groups_of_channels_in_their_own_ranges() -> None:
    x, labels = behind_silu(), torch.arange(16) // 4
    quantizer = ActivationQuantizer(uint8)
    ends = [to_scale(x.min() * part, x.max() * part, uint8) for part in (0.5, 1.0)]
    quantizer.set(*(torch.stack(each) for each in zip(*ends, strict=True)), torch.tensor([10.0]))
    found = {f"{CHANNELS}.low": x.amin(0), f"{CHANNELS}.high": x.amax(0)}
    set_group_scales(quantizer, found, CHANNELS, labels, -1)
    assert quantizer.scale.shape == quantizer.zero_point.shape == (2, 16)
    assert torch.allclose(quantizer.scale[0] * 2, quantizer.scale[1], rtol=0.02)


def test_q_k_and_v_have_groups_too_and_the_prediction_comes_closer(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"activations": "uint6", "weights": "int8", "coverage": "dgq-paper"}
    axes = {}
    for attention in (False, True):
        stages = (
            ("weight-ranges", {}),
            ("activation-ranges", {}),
            ("group-tokens", {"groups": 4, "channels": True, "attention": attention}),
        )
        output = tmp_path / str(attention)
        with calibrating(tiny_unet(), DATA, output, target="simulated", stages=stages, **recipe) as session:
            run_stages(session)
            found = [m for m in session.denoiser.modules() if isinstance(m, AttentionQuantizers)]
            axes[attention] = [q.axis for m in found for q in (m.query, m.key, m.value)]
    assert set(axes[False]) == {None}
    assert axes[True]
    assert None not in axes[True]


def test_what_folding_cannot_hold_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (("group-channels", {"form": "fold", "groups": 4, "check": False}), ("weight-ranges", {}))
    recipe: dict[str, Any] = {"activations": "uint8", "weights": "int8", "target": "openvino"}
    with calibrating(tiny_unet(), DATA, tmp_path / "out", stages=stages, **recipe) as session:
        run_stages(session)
        report = json.loads((session.draft.content / session.component / "groups.json").read_text())
    counts, layers = report["counts"], report["layers"]
    lacking = [path for path, layer in layers.items() if not layer["left"] and layer["paper_steps"] < 0.8]
    assert counts["without_zero_points"] == len(lacking) > 0
    said = capsys.readouterr().err
    assert f"{len(lacking)} of them have one zero point for all groups" in said
    for reason, count in counts["left"].items():
        assert f"{count} ({reason})" in said
