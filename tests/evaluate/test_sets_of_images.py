"""Metrics of sets of images: oracles on the same features, intervals, batches, real images, refusals."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from sklearn.metrics.pairwise import polynomial_kernel
from torch import Tensor

from qdeploy.evaluate import metric_context
from qdeploy.evaluate.intervals import of_mean, of_share, of_statistic
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import metrics
from qdeploy.evaluate.metrics.frechet_features import frechet
from qdeploy.evaluate.metrics.inception_score import inception_score
from qdeploy.evaluate.metrics.kid import KernelSums, kid
from qdeploy.evaluate.metrics.lpips import BACKBONE, LINEAR, STAGES, Lpips
from qdeploy.evaluate.metrics.precision_recall import share_within
from qdeploy.evaluate.metrics.ssim import ssim
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.model.folder import open_model
from qdeploy.system.errors import InvalidInputError, QDeployError

SETS = ("kid", "spatial_frechet", "precision_recall", "inception_score", "ssim", "psnr")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    return noise(60, 12).double(), 0.7 * noise(50, 12, seed=1).double() + 0.4


def digits_pair(rows: int = 24) -> Pair:
    images = noise(rows, 1, 28, 28).sigmoid()
    return Pair([], images, (images + 0.1 * noise(rows, 1, 28, 28, seed=1)).clamp(0, 1))


def measured(pairs: list[Pair], context: MetricContext, names: tuple[str, ...] = SETS) -> dict[str, Any]:
    meters = {name: metrics()[name].meter(context) for name in names}
    for pair in pairs:
        for meter in meters.values():
            assert meter is not None
            meter.add(pair)
    return {name: meter.result() for name, meter in meters.items() if meter}


# -- oracles -----------------------------------------------------------------------------------------------


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel(features: tuple[Tensor, Tensor]) -> None:
    x, y = (side.numpy() for side in features)
    within = [polynomial_kernel(side, degree=3, coef0=1) for side in (x, y)]
    expected = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within)
    expected -= 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean()
    assert kid(*features) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_kid_without_a_group_follows_from_sums(
    features: tuple[Tensor, Tensor], paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[KernelSums.__module__], "_BLOCK", 4)  # several blocks in a group
    x, y = features[0][:50], features[1]
    sums = KernelSums(x, y, paired, groups=7)
    assert sums.distance() == pytest.approx(kid(x, y, paired), abs=1e-12)
    for group in range(7):
        rows = (torch.arange(50) % 7 != group).nonzero().flatten()
        expected = kid(x[rows], y[rows] if paired else y, paired)
        assert sums.distance(without=group) == pytest.approx(expected, abs=1e-12)


def test_precision_counts_what_is_within_a_ball(features: tuple[Tensor, Tensor]) -> None:
    x, y = features
    hits = 0
    for point in x:
        for centre in y:
            radius = sorted(float((other - centre).norm()) for other in y)[
                3
            ]  # the first is the centre itself
            if float((point - centre).norm()) <= radius:
                hits += 1
                break
    assert share_within(x, y) == (hits, len(x))


@pytest.mark.parametrize("kind", ["apart", "paired", "equal", "few values", "far from zero"])
def test_matrix_products_find_the_same_neighbours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[share_within.__module__], "_BLOCK", 2000)  # several blocks
    x, y = noise(120, 6).double(), noise(90, 6, seed=1).double()
    if kind == "paired":
        y = x + 1e-3 * noise(120, 6, seed=1).double()
    elif kind == "equal":
        y = x
    elif kind == "few values":  # many distances are equal, to each other and to radii
        x, y = x.round(), y.round()
    elif kind == "far from zero":
        x, y = x + 1e4, y + 1e4

    def direct(one: Tensor, other: Tensor) -> Tensor:
        return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")

    radii = direct(y, y).kthvalue(4).values
    assert share_within(x, y) == (int((direct(x, y) <= radii).any(1).sum()), len(x))


def test_the_inception_score_spans_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(20, 5)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(5).repeat(4, 1)) == pytest.approx(5)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch-fidelity's formulas. Its package imports torchvision for data sets that are not asked for."""
    pytest.importorskip(
        "torch_fidelity.version", exc_type=ImportError
    ) if "torchvision" in sys.modules else None
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for data_set in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sys.modules["torchvision.datasets"], data_set, type(data_set, (), {}))
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
        functional = sys.modules["torchvision.transforms.functional"]
        sys.modules["torchvision.transforms"].functional = functional  # type: ignore[attr-defined]
    return pytest.importorskip("torch_fidelity", exc_type=ImportError)


def test_torch_fidelity_finds_the_same_in_the_same_features(
    fidelity: Any, features: tuple[Tensor, Tensor]
) -> None:
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    x, y = features[0][:50], features[1]
    theirs = metric_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=50, verbose=False)
    assert kid(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    m, n = x.numpy(), y.numpy()
    kernels = (metric_kid.kernel_poly(a, b) for a, b in ((m, m), (m, n), (n, n)))
    paired = metric_kid.mmd2(*kernels, mmd_est="u-statistic")
    assert kid(x, y, paired=True) == pytest.approx(paired, abs=1e-6)
    statistics = [metric_fid.fid_features_to_statistics(side) for side in (x, y)]
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet(x, y) == pytest.approx(fid["frechet_inception_distance"], abs=1e-6)
    shares = metric_prc.prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    for name, pair in {"precision": (x, y), "recall": (y, x)}.items():
        hits, count = share_within(*pair)
        assert hits / count == pytest.approx(shares[name], abs=1e-6)
    score = metric_isc.isc_features_to_metric(x, splits=1, shuffle=False)
    assert inception_score(x) == pytest.approx(score["inception_score_mean"], abs=1e-6)


def test_ssim_is_that_of_an_image_filter() -> None:
    images, expected = noise(2, 3, 20, 24).sigmoid(), noise(2, 3, 20, 24, seed=1).sigmoid()

    def local(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return scipy.ndimage.gaussian_filter(values, 1.5, truncate=3.4)[5:-5, 5:-5]  # 11 pixels

    for number in range(2):
        found = []
        for x, y in zip(images[number].double().numpy(), expected[number].double().numpy(), strict=True):
            a, b = local(x), local(y)
            xx, yy, xy = local(x * x) - a * a, local(y * y) - b * b, local(x * y) - a * b
            found.append((2 * a * b + 1e-4) * (2 * xy + 9e-4) / ((a * a + b * b + 1e-4) * (xx + yy + 9e-4)))
        assert ssim(images, expected)[number] == pytest.approx(float(np.mean(found)), abs=1e-9)
    assert ssim(images, images) == pytest.approx([1, 1])
    assert len(ssim(noise(1, 1, 4, 4), noise(1, 1, 4, 4))) == 1  # smaller than the window


# -- intervals ---------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Means of many samples of known distributions; 95 % of 400 is 380, give or take four deviations."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 40, generator=generator).exp()  # skewed, as errors of images are
    truth = math.exp(0.5)
    hits = {"mean": 0, "jackknife": 0, "share": 0}
    for sample in samples:
        low, high = of_mean(sample.log().tolist()) or (0, 0)
        hits["mean"] += low <= 0 <= high
        low, high = of_statistic(lambda rows, x=sample: float(x[rows].mean()), 40) or (0, 0)  # type: ignore[misc]
        hits["jackknife"] += low <= truth <= high
        low, high = of_share(int((sample > 3).sum()), 40)
        hits["share"] += low <= 0.13601 <= high  # P(exp(z) > 3)
    assert hits["mean"] >= 362
    assert hits["jackknife"] >= 340  # a skewed one: known to be a little short
    assert hits["share"] >= 362


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (1, 1), (93, 100), (480, 512)])
def test_the_interval_of_a_share_is_that_of_scipy(hits: int, count: int) -> None:
    from scipy.stats import binomtest

    oracle = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert of_share(hits, count) == pytest.approx([oracle.low, oracle.high], abs=1e-12)


def test_the_jackknife_of_a_mean_is_the_usual_error_of_a_mean() -> None:
    values = noise(10).double()
    low, high = of_statistic(lambda rows: float(values[rows].mean()), 10) or (0, 0)
    assert [low, high] != pytest.approx(of_mean(values.tolist()))  # five groups of two, not ten of one
    values = noise(20).double()
    found = of_statistic(lambda rows: float(values[rows].mean()), 20)
    means = values.view(2, 10).mean(0)
    assert found == pytest.approx(of_mean(means.tolist()))


def test_few_images_have_no_interval() -> None:
    assert of_mean([1.0]) is None
    assert of_statistic(lambda rows: 0.0, 3) is None


# -- on images ---------------------------------------------------------------------------------------------


def test_batches_do_not_matter_and_everything_is_named() -> None:
    pair, model = digits_pair(), open_model("digits")
    parts = [Pair([], pair.expected_images[at : at + 7], pair.images[at : at + 7]) for at in range(0, 24, 7)]
    whole, cut = measured([pair], MetricContext(model)), measured(parts, MetricContext(model))
    assert whole == measured([digits_pair()], MetricContext(model))
    for name in SETS:
        assert whole[name]["count"] == 24
        assert whole[name]["reference"]
        assert whole[name]["confidence"] == 0.95
        assert {key: value for key, value in cut[name].items() if isinstance(value, str)} == {
            key: value for key, value in whole[name].items() if isinstance(value, str)
        }
    assert whole["kid"]["called"] == "KID-local"
    assert whole["spatial_frechet"]["called"] == "sFID-local"
    assert cut["kid"]["value"] == pytest.approx(whole["kid"]["value"], abs=2e-6)
    assert cut["spatial_frechet"]["value"] == pytest.approx(whole["spatial_frechet"]["value"], rel=1e-3)


def test_equal_sets_are_at_no_distance() -> None:
    images = noise(24, 1, 28, 28).sigmoid()
    same = measured([Pair([], images, images)], MetricContext(open_model("digits")))
    assert same["kid"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["spatial_frechet"]["value"] == pytest.approx(0, abs=1e-3)
    assert same["precision_recall"]["precision"]["value"] == same["precision_recall"]["recall"]["value"] == 1
    assert same["ssim"]["mean"] == 1


def write_images(folder: Path, count: int, size: tuple[int, int] = (28, 28)) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = (noise(*size, seed=number).sigmoid() * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_real_images_become_the_reference_and_their_features_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    real = write_images(tmp_path / "real", 12)
    first = measured(
        [digits_pair()], MetricContext(open_model("digits"), real=real), ("kid", "precision_recall")
    )
    assert first["kid"]["reference"] == "real images in real"
    assert (first["kid"]["count"], first["kid"]["reference_count"]) == (24, 12)
    assert "of_the_reference" in first["kid"]
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
    again = MetricContext(open_model("digits"), real=real)
    assert again.extractor is not None
    object.__setattr__(again.extractor, "run", None)  # nothing is left to compute
    assert again.real_features is not None
    assert len(again.real_features.pooled) == 12


@pytest.mark.parametrize(
    "case",
    ["nothing", "empty", "other size", "mixed sizes", "text", "no network", "bad network"],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(case: str, tmp_path: Path, ddpm: Path) -> None:
    real, model, features = tmp_path / "real", open_model("digits"), None
    if case == "empty":
        real.mkdir()
    if case in ("other size", "mixed sizes", "no network", "bad network", "text"):
        write_images(real, 4, (16, 16) if case == "other size" else (28, 28))
    if case == "mixed sizes":
        Image.new("L", (9, 9)).save(real / "odd.png")
    if case == "text":
        (real / "0.png").write_text("no picture")
    if case == "no network":
        model = open_model(ddpm)
    if case == "bad network":
        features = tmp_path / "network.pth"
        features.write_text("no weights")

    def compared() -> None:
        context = MetricContext(model, features=features, real=real)
        context.check()
        measured([digits_pair()], context, ("kid",))

    with pytest.raises(QDeployError) as refused:
        compared()
    assert refused.value.exit_code in (2, 3, 4, 5)
    assert "\n" not in str(refused.value)


# -- networks of others, at hand ---------------------------------------------------------------------------


def lpips_folder(folder: Path) -> Path:
    """Random weights under the published names, in the published layout."""
    folder.mkdir()
    backbone, width, number = {}, 3, 0
    for stage in STAGES:
        for out in stage:
            backbone[f"features.{number}.weight"] = noise(out, width, 3, 3, seed=number) / math.sqrt(
                4.5 * width
            )
            backbone[f"features.{number}.bias"] = torch.zeros(out)
            number, width = number + 2, out
        number += 1
    torch.save(backbone, folder / BACKBONE)
    linear = {f"lin{n}.model.1.weight": torch.rand(1, w[-1], 1, 1) for n, w in enumerate(STAGES)}
    torch.save(linear, folder / LINEAR)
    return folder


def test_lpips_is_zero_for_equal_images_and_grows_with_noise(tmp_path: Path) -> None:
    network = Lpips.load(lpips_folder(tmp_path / "lpips"))
    images = noise(2, 3, 32, 32).sigmoid()
    near, far = (network(images + scale * noise(2, 3, 32, 32, seed=1), images) for scale in (0.02, 0.2))
    assert network(images, images).tolist() == [0, 0]
    assert bool((far > near).all())
    (tmp_path / "lpips" / LINEAR).write_text("no weights")
    with pytest.raises(InvalidInputError, match=r"vgg\.pth is no file of weights"):
        Lpips.load(tmp_path / "lpips")
    with pytest.raises(InvalidInputError, match="does not exist"):
        Lpips.load(tmp_path)


def test_no_clip_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no CLIP model"):
        metrics()["clip_score"].meter(MetricContext(open_model("digits"), clip=tmp_path))


def test_an_image_is_refused_by_its_header_before_it_is_unpacked(tmp_path: Path) -> None:
    """A PNG of a few kilobytes may claim gigabytes of pixels."""
    Image.new("1", (metric_context.LARGEST_SIDE + 1, 16)).save(tmp_path / "a.png")
    with pytest.raises(InvalidInputError, match=r"has 8193 x 16 pixels, too many for 1 images"):
        metric_context.read_pictures([tmp_path / "a.png"])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(InvalidInputError, match="no readable image"):
        metric_context.read_pictures([tmp_path / "b.png"])
