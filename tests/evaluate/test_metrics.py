"""Metrics agree with closed forms and oracles, and do not depend on how images are batched."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Meter, metrics
from qdeploy.evaluate.metrics.drift import DriftMeter, drift
from qdeploy.evaluate.metrics.frechet import (
    FrechetMeter,
    Gaussian,
    fd_local,
    features_of,
    frechet_distance,
    gaussian,
    real_images,
)
from qdeploy.evaluate.metrics.psnr import PsnrMeter, psnr_db
from qdeploy.evaluate.metrics.sqnr import SqnrMeter, summary
from qdeploy.evaluate.paired_sample import Call, Pair
from qdeploy.model.folder import open_model
from qdeploy.system.decibels import decibels, sqnr_by_row, sqnr_db
from tests.plugins import install

FEATURES = open_model("digits").path / "features"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_gaussian(size: int, seed: int) -> Gaussian:
    root = noise(size, size, seed=seed).double()
    return Gaussian(noise(size, seed=seed + 100).double(), root @ root.T, 1000)


def pair(rows: int, seed: int = 0) -> Pair:
    """Two trajectories of three calls, two of them at the same timestep."""
    expected = [noise(rows, 3, 4, 4, seed=seed + step) for step in range(3)]
    wrong = [x + 0.1 * noise(rows, 3, 4, 4, seed=seed + 50 + step) for step, x in enumerate(expected)]
    calls = [
        Call(t, x, y, x + 1, y + 1) for t, x, y in zip((999.0, 500.0, 500.0), expected, wrong, strict=True)
    ]
    images = noise(rows, 1, 16, 16, seed=seed).sigmoid()
    return Pair(calls, images, (images + 0.05).clamp(0, 1))


def cut(whole: Pair, size: int) -> list[Pair]:
    """The same rows in smaller batches."""
    parts = []
    for start in range(0, len(whole.images), size):
        rows = slice(start, start + size)
        calls = [
            Call(
                c.timestep,
                c.expected[rows],
                c.predicted[rows],
                c.expected_sample[rows],
                c.sample[rows],
            )
            for c in whole.calls
        ]
        parts.append(Pair(calls, whole.expected_images[rows], whole.images[rows]))
    return parts


# -- SQNR --------------------------------------------------------------------------------------------------


@given(st.floats(-60, 100))
def test_sqnr_is_that_of_the_noise_that_was_added(decibel: float) -> None:
    signal, added = noise(2, 500).double(), noise(2, 500, seed=1).double()
    added *= signal.norm() / added.norm() * 10 ** (-decibel / 20)
    assert sqnr_db(signal + added, signal) == pytest.approx(decibel, abs=1e-6)


def test_sqnr_has_an_end_on_both_sides() -> None:
    x = noise(3, 4)
    assert sqnr_db(x, x) == sqnr_db(torch.zeros(2), torch.zeros(2)) == 200
    assert sqnr_db(x, torch.zeros_like(x)) == -200
    assert decibels(1.0, float("nan")) == -200


def test_sqnr_of_rows_is_that_of_each_row() -> None:
    x = noise(3, 8)
    assert sqnr_by_row(x * 1.1, x) == pytest.approx([20, 20, 20], abs=1e-4)


def test_a_summary_names_the_median_and_the_worst_timestep() -> None:
    told = summary({999.0: 30.0, 10.0: 10.0, 500.5: 20.0})
    assert told == {"median": 20, "worst": 10, "by_timestep": {"10": 10, "500.5": 20, "999": 30}}
    assert list(told["by_timestep"]) == ["10", "500.5", "999"]


def test_calls_at_one_timestep_are_measured_together() -> None:
    both = pair(4)
    meter = SqnrMeter()
    meter.add(both)
    first, *repeated = both.calls
    stacked = [torch.cat([getattr(call, name) for call in repeated]) for name in ("predicted", "expected")]
    measured = meter.result()["by_timestep"]
    assert measured["999"] == pytest.approx(sqnr_db(first.predicted, first.expected), abs=0.01)
    assert measured["500"] == pytest.approx(sqnr_db(*stacked), abs=0.01)


# -- PSNR and drift ----------------------------------------------------------------------------------------


def test_psnr_of_a_known_error() -> None:
    images = torch.full((2, 1, 4, 4), 0.5)
    assert psnr_db(images + 0.1, images) == pytest.approx([20, 20], abs=1e-4)
    assert psnr_db(images, images) == [100, 100]


def test_drift_of_a_known_deviation() -> None:
    x = noise(2, 3, 4, 4)
    assert drift(x * 1.25, x) == pytest.approx(0.25, abs=1e-6)
    assert drift(x, x) == 0


def test_drift_is_told_in_the_order_of_sampling() -> None:
    meter = DriftMeter()
    meter.add(pair(4))
    told = meter.result()
    assert list(told["by_timestep"]) == ["999", "500"]
    assert told["worst"] >= told["final"] > 0


# -- Fréchet distance --------------------------------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians() -> None:
    means, deviations = (noise(2, 7).double(), noise(2, 7, seed=1).double().abs())
    one, other = (Gaussian(m, torch.diag(s**2), 10) for m, s in zip(means, deviations, strict=True))
    closed = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(one, other) == pytest.approx(float(closed), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_agrees_with_the_matrix_square_root(seed: int) -> None:
    one, other = random_gaussian(12, seed), random_gaussian(12, seed + 1)
    root = np.real(scipy.linalg.sqrtm((one.covariance @ other.covariance).numpy()))
    trace = float((one.covariance + other.covariance).trace()) - 2 * np.trace(root)
    oracle = float((one.mean - other.mean).square().sum()) + trace
    assert frechet_distance(one, other) == pytest.approx(oracle, rel=1e-8)


def test_frechet_distance_is_a_distance() -> None:
    a, b, c = (random_gaussian(6, seed) for seed in range(3))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert math.sqrt(frechet_distance(a, c)) <= math.sqrt(frechet_distance(a, b)) + math.sqrt(
        frechet_distance(b, c)
    )


def test_fewer_vectors_than_dimensions_have_a_distance_too() -> None:
    few = gaussian(noise(5, 20))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    shifted = Gaussian(few.mean + 1, few.covariance, few.count)
    assert frechet_distance(few, shifted) == pytest.approx(20, rel=1e-6)


def test_statistics_are_those_of_numpy() -> None:
    x = noise(50, 4)
    found = gaussian(x)
    torch.testing.assert_close(found.mean, torch.from_numpy(np.mean(x.double().numpy(), 0)))
    torch.testing.assert_close(found.covariance, torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)))
    assert found.count == 50


def test_fd_local_counts_images_and_takes_bytes_and_floats() -> None:
    images = torch.randint(0, 256, (300, 1, 16, 16), dtype=torch.uint8)
    found = fd_local(images, FEATURES)
    assert found == fd_local(images.float() / 255, FEATURES)
    assert found["count"] == 300
    assert found["real_count"] == real_images(FEATURES).count > 1000


def test_features_do_not_depend_on_the_batch() -> None:
    from qdeploy.evaluate.features import FeatureNetwork

    images, network = noise(300, 1, 16, 16).sigmoid(), FeatureNetwork.load(FEATURES)
    single = torch.cat([features_of(image[None], network) for image in images[:8]])
    torch.testing.assert_close(features_of(images, network)[:8], single, rtol=1e-4, atol=1e-5)


def test_one_image_has_no_fd_local() -> None:
    meter = FrechetMeter(FEATURES)
    meter.add(pair(1))
    assert meter.result() is None


# -- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_results_do_not_depend_on_the_batch(size: int) -> None:
    whole = pair(8)

    def measured(parts: list[Pair]) -> list[object]:
        meters: list[Meter] = [SqnrMeter(), PsnrMeter(), DriftMeter(), FrechetMeter(FEATURES)]
        for part in parts:
            for meter in meters:
                meter.add(part)
        return [meter.result() for meter in meters]

    by_parts, at_once = measured(cut(whole, size)), measured([whole])
    assert by_parts[:3] == at_once[:3]
    assert by_parts[3] == pytest.approx(at_once[3], rel=1e-3)


def test_the_registry_lists_every_metric() -> None:
    assert {"sqnr_db", "psnr_db", "drift", "fd_local"} <= metrics().keys()
    assert all(metric.description for metric in metrics().values())


def test_a_metric_without_its_means_is_left_out(ddpm: Path) -> None:
    started = {name for name, metric in metrics().items() if metric.meter(MetricContext(open_model(ddpm)))}
    with_features = {"fd_local", "fid", "inception_score", "kid", "precision_recall", "spatial_frechet"}
    assert started == metrics().keys() - with_features - {"attributes", "clip_score", "lpips"}
    local = {name for name, metric in metrics().items() if metric.meter(MetricContext(open_model("digits")))}
    assert local & with_features == with_features - {"fid"}
    assert "attributes" in {
        name for name, metric in metrics().items() if metric.meter(MetricContext(open_model("scenes")))
    }


def test_a_new_metric_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from qdeploy.evaluate.metrics.base import Metric\n"
        "METRIC = Metric('brightness', 'how bright images are', lambda model: None)\n"
    )
    entries = {"qdeploy.metrics": {"brightness": "my_package.brightness"}}
    install(tmp_path, monkeypatch, entries, brightness=source)
    assert metrics()["brightness"].description == "how bright images are"
