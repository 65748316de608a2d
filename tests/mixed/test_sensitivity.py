"""Harm of single layers: exact against its definition, first order against exact, resumption, rankings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import nn

import qdeploy
from qdeploy.mixed import measuring
from qdeploy.mixed.estimate import first_order
from qdeploy.mixed.measure import Exact
from qdeploy.mixed.options import LayerOptions, Option, quantized_to
from qdeploy.mixed.ranking import agreement
from qdeploy.mixed.rows import choose_rows
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import quantized_layers
from qdeploy.recipe.formats import FORMATS
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.helpers import MemoryRows, calibrating, files_in, tiny_unet


@pytest.fixture(scope="module")
def data(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("sensitivity") / "set"
    made = qdeploy.collect(ddpm, place, keep=4, samples=6, steps=8)
    assert isinstance(made, Artifact)
    return made


@pytest.fixture(scope="module")
def measured(ddpm: Path, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("sensitivity") / "all"
    made = qdeploy.sensitivity(ddpm, place, calibration=data, formats=["int8", "int4"], rows=8)
    assert isinstance(made, Artifact)
    return made


def test_exact_harm_is_that_of_a_network_with_this_layer_alone_quantized(tmp_path: Path) -> None:
    """The oracle rounds the weight of a plain network; no quantized layer takes part in it."""
    oracle, rows = tiny_unet(), MemoryRows.noisy()
    with calibrating(tiny_unet(), rows, tmp_path / "c", weights="int4", activations="none") as session:
        path = session.layers[2].path
        layer = quantized_layers(session.denoiser)[path]
        subject = LayerOptions(path, layer, {"int4": quantized_to(layer, FORMATS["int4"], "minmax")})
        chosen = choose_rows(session, 8)
        noise = Exact(session, chosen).noise(subject)
    inputs = rows.inputs(chosen.numbers)
    expected = denoise(oracle, inputs)
    weight = oracle.get_submodule(path).get_parameter("weight")
    scale = weight.flatten(1).abs().amax(1) / 7
    shape = (-1, *[1] * (weight.ndim - 1))
    weight.copy_((weight / scale.view(shape)).round().clamp(-8, 7) * scale.view(shape))
    error = (denoise(oracle, inputs) - expected).double().square().flatten(1).sum(1)
    signal = expected.double().square().flatten(1).sum(1)
    by_hand = chosen.by_timestep(error) / chosen.by_timestep(signal)
    assert torch.allclose(noise[0], by_hand, rtol=1e-4)


def test_first_order_is_exact_where_the_rest_of_the_network_is_linear(tmp_path: Path) -> None:
    """Then only the probes scatter; with many of them the estimate meets the measurement."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.inner = nn.Sequential(
                    nn.Conv2d(3, 8, 3, padding=1),
                    nn.Conv2d(8, 8, 3, padding=1),
                    nn.Conv2d(8, 3, 3, padding=1),
                )

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> object:
            return (self.inner(sample) + 0 * timestep.view(-1, 1, 1, 1),)

    with calibrating(
        Linear().requires_grad_(False),
        MemoryRows.noisy(),
        tmp_path / "c",
        coverage="qdiffusion-paper",
        weights="int4",
        activations="int8",
        target="simulated",
    ) as session:
        from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges

        WeightRanges().run(session)
        ActivationRanges().run(session)
        layers = quantized_layers(session.denoiser)
        subjects = [
            LayerOptions(path, layer, {"int4": quantized_to(layer, FORMATS["int4"], "minmax")})
            for path, layer in layers.items()
        ]
        rows = choose_rows(session, 16)
        exact = [Exact(session, rows).noise(subject) for subject in subjects]
        cheap = first_order(session, rows, subjects, probes=400)
    assert len(subjects) == 3
    for measured, estimated in zip(exact, cheap, strict=True):
        assert torch.allclose(measured.mean(1), estimated.mean(1), rtol=0.15)


def test_trying_an_option_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), MemoryRows.noisy(), tmp_path / "c") as session:
        layer = next(iter(quantized_layers(session.denoiser).values()))
        own = layer.weight_quantizers
        subject = LayerOptions("x", layer, {"int8": quantized_to(layer, FORMATS["int8"], "lp")})
        layer.quantized = False

        def stopped_within() -> None:
            with subject.trying(Option("weights", "int8")):
                assert layer.quantized
                assert not any(quantizer.enabled for quantizer in layer.activation_quantizers)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            stopped_within()
        assert layer.weight_quantizers is own
        assert not layer.quantized
        assert all(quantizer.enabled for quantizer in layer.activation_quantizers)


def test_more_bits_do_less_harm_and_every_covered_layer_is_ranked(measured: Artifact) -> None:
    report = json.loads(measured.file(measuring.SENSITIVITY).read_text())
    harms = [layer["harm"]["exact"]["weights"] for layer in report["layers"]]
    assert sum(harm["int8"] < harm["int4"] for harm in harms) == len(harms)
    totals = [
        sum(
            layer["harm"]["exact"][part][name]
            for part, name in (("weights", "int4"), ("activations", "int8"))
        )
        for layer in report["layers"]
    ]
    assert totals == sorted(totals, reverse=True)
    shown = [(layer["name"], layer["bits"], layer["harm_db"]) for layer in report["layers"]]
    assert [harm for _, _, harm in shown] == pytest.approx(
        [10 * math.log10(total) for total in totals], abs=0.01
    )
    assert {bits for _, bits, _ in shown} == {4}
    assert (
        sorted(report["rankings"]["cheap"])
        == sorted(report["ranking"])
        == sorted(layer["path"] for layer in report["layers"])
    )
    assert report["agreement"]["shared"] >= report["agreement"]["top"] // 2
    assert report["agreement"]["spearman"] > 0.5


def test_a_measurement_that_was_stopped_goes_on_and_ends_in_the_same_bytes(
    ddpm: Path, data: Artifact, measured: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"calibration": data, "formats": ["int8", "int4"], "rows": 8}
    plain, done = Exact.noise, []

    def stopping(self: Exact, subject: LayerOptions) -> torch.Tensor:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(subject.path)
        return plain(self, subject)

    monkeypatch.setattr(Exact, "noise", stopping)
    with pytest.raises(KeyboardInterrupt):
        qdeploy.sensitivity(ddpm, tmp_path / "s", **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()
    again: list[str] = []
    monkeypatch.setattr(
        Exact, "noise", lambda self, subject: (again.append(subject.path), plain(self, subject))[1]
    )
    resumed = qdeploy.sensitivity(ddpm, tmp_path / "s", **asked)  # type: ignore[arg-type]
    assert isinstance(resumed, Artifact)
    assert not set(done) & set(again)
    assert resumed.sha256 == measured.sha256
    names = [name for name in files_in(measured.path) if name != "qdeploy.json"]
    assert all(files_in(resumed.path)[name] == files_in(measured.path)[name] for name in names)


def test_a_checkpoint_is_judged_in_its_own_formats_and_roundings(
    ddpm: Path, data: Artifact, tmp_path: Path
) -> None:
    """With all layers in float but one, the checkpoint's error is this layer's harm."""
    names = [
        layer["path"]
        for layer in json.loads(
            qdeploy.calibrate(ddpm, tmp_path / "all", calibration=data).file("unet/layers.json").read_text()  # type: ignore[union-attr]
        )["layers"]
    ]
    others = tuple(names[1:])
    checkpoint = qdeploy.calibrate(
        ddpm, tmp_path / "one", calibration=data, weights="int4", activations="none", exclude=others
    )
    assert isinstance(checkpoint, Artifact)
    judged = qdeploy.sensitivity(checkpoint, tmp_path / "s", calibration=data, rows=8)
    assert isinstance(judged, Artifact)
    report = json.loads(judged.file(measuring.SENSITIVITY).read_text())
    assert [layer["path"] for layer in report["layers"]] == names[:1]
    from safetensors.torch import load_file

    harm = load_file(judged.file(measuring.HARM))
    from qdeploy.calibration_set.dataset import CalibrationSet
    from qdeploy.model.folder import open_model

    rows = CalibrationSet.open(data.path)
    network, model = load_checkpoint(checkpoint), open_model(ddpm).load()
    chosen = [row for row in range(len(rows)) if rows.timesteps[row] == harm["timesteps"][0]]
    inputs = rows.inputs(chosen)
    ratio = (denoise(network, inputs) - denoise(model, inputs)).square().sum() / denoise(
        model, inputs
    ).square().sum()
    assert float(harm[f"{names[0]}.noise"][0, 0]) == pytest.approx(float(ratio), rel=0.5)


def test_a_bare_estimate_writes_nothing(ddpm: Path, data: Artifact, tmp_path: Path) -> None:
    estimate = qdeploy.sensitivity(ddpm, tmp_path / "s", calibration=data, dry_run=True)
    assert not isinstance(estimate, Artifact)
    assert estimate.seconds > 0
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_measured_is_refused(
    ddpm: Path, data: Artifact, measured: Artifact, tmp_path: Path
) -> None:
    for given in (
        {"rows": 0},
        {"probes": 0},
        {"formats": ["int9"]},
        {"formats": ["fp8"]},
        {"formats": ["uint8"]},
    ):
        with pytest.raises(UsageError):
            qdeploy.sensitivity(ddpm, tmp_path / "s", calibration=data, **given)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="sensitivity"):
        qdeploy.sensitivity(measured.path, tmp_path / "s", calibration=data)


def test_the_commands_print_rankings_and_budgets_as_json(
    qdeploy: Callable[..., Result], ddpm: Path, data: Artifact, tmp_path: Path
) -> None:
    common = ("--calibration", data.path, "--json")
    harm = qdeploy("sensitivity", ddpm, "-o", tmp_path / "s", "--cheap", "--rows", 8, *common)
    assert harm.exit_code == 0, harm.output
    told = json.loads(harm.stdout)
    assert told["kind"] == "sensitivity"
    assert told["ranking"] == [layer["path"] for layer in told["layers"]]
    asked = ("--budget", "size=26%", "--sensitivity", tmp_path / "s", "--effort", "fast", *common)
    made = qdeploy("calibrate", ddpm, "-o", tmp_path / "c", *asked)
    assert made.exit_code == 0, made.output
    budget = json.loads(made.stdout)["budget"]
    assert budget["chosen"]["size"] <= budget["bounds"]["size"]
    refused = qdeploy("calibrate", ddpm, "-o", tmp_path / "d", "--budget", "size=1%", *asked[2:])
    assert refused.exit_code == 2
    shown = qdeploy("sensitivity", ddpm, "-o", tmp_path / "s", "--cheap", "--rows", 8, *common[:2])
    assert told["ranking"][0] in shown.stdout


def test_agreement_counts_what_both_rankings_have_in_front() -> None:
    names = [f"layer{number}" for number in range(20)]
    assert agreement(names, names) == {"top": 10, "shared": 10, "layers": names[:10], "spearman": 1.0}
    assert agreement(names, names[::-1]) == {"top": 10, "shared": 0, "layers": [], "spearman": -1.0}
