"""Names of cards, and the demands of a graph on them."""

from __future__ import annotations

import pytest

from qdeploy.engines.tensorrt.flavour import RTX, TENSORRT
from qdeploy.engines.tensorrt.gpu_targets import check_products, choose_targets, parse_gpus
from qdeploy.engines.tensorrt.graph import Graph
from qdeploy.export.products import Product
from qdeploy.system.errors import CapabilityError, QDeployError, UsageError
from tests.engines.tensorrt.bench import ADA


def graph(*kinds: str) -> Graph:
    return Graph((), (), 21, frozenset(kinds), 0)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("sm89", (89,)), ("rtx4090", (89,)), ("RTX 4070 Ti SUPER", (89,)), ("GeForce RTX 5090", (120,)),
        ("8.6", (86,)), ("sm120,sm86", (86, 120)), ("rtx3090, rtx4090,l40s", (86, 89)), ("a100", (80,)),
        ("rtx2080ti", (75,)), ("rtx 6000 ada", (89,)), ("rtx a6000", (86,)), ("gb10", (121,)),
    ],
)  # fmt: skip
def test_cards_and_numbers_name_a_compute_capability(text: str, targets: tuple[int, ...]) -> None:
    assert parse_gpus(text, RTX) == targets


@pytest.mark.parametrize("text", ["", " , ", "rtx", "sm90a", "rtx4000", "sm99", "89x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--gpu"):
        parse_gpus(text, RTX)


def test_without_a_word_the_machines_own_gpu_is_meant_else_all_that_can() -> None:
    assert choose_targets(RTX, None, graph("int8"), ADA) == (89,)
    assert choose_targets(RTX, None, graph("int8"), None) == (86, 89, 120)
    assert choose_targets(RTX, None, graph("fp8"), None) == (89, 120)
    assert choose_targets(RTX, None, graph("fp4", "fp8"), None) == (120,)
    assert choose_targets(TENSORRT, None, graph("int8"), ADA) == ()


@pytest.mark.parametrize(
    ("kind", "gpu"), [("fp8", "sm86"), ("fp4", "sm89"), ("int4", "sm75"), ("int8", "sm75,sm86")]
)
def test_what_a_gpu_lacks_is_refused(kind: str, gpu: str) -> None:
    with pytest.raises(QDeployError) as caught:
        choose_targets(RTX, gpu, graph(kind), None)
    assert caught.value.exit_code == 4


def test_versions_without_int8_convolutions_refuse_those_alone() -> None:
    conv = Product("conv", "Conv", "int8", False, True, False)
    linear = Product("linear", "MatMul", "int8", False, True, False)
    for version in ((1, 5, 0, 114), (1, 6, 1, 120)):
        check_products(RTX, version, (89,), [linear])
        with pytest.raises(CapabilityError, match=r"no int8 convolutions, 1\.7 has them"):
            check_products(RTX, version, (89,), [linear, conv])
    check_products(RTX, (1, 7, 1, 116), (89,), [conv])


def test_turing_has_no_products_of_float32() -> None:
    single = Product("time_embedding", "Gemm", "", False, False, True)
    check_products(RTX, (1, 7), (86,), [single])
    with pytest.raises(CapabilityError, match="time_embedding is one of 1: export with --time-table"):
        check_products(RTX, (1, 7), (75,), [single])
