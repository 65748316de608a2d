"""What cannot become an engine is refused in one sentence before anything is built."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdeploy.engines.build import build_engine
from qdeploy.engines.tensorrt import builder
from qdeploy.engines.tensorrt.flavour import FLAVOURS, Flavour
from qdeploy.engines.tensorrt.plan import TRUST
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.engines.tensorrt_rtx import build
from qdeploy.system.errors import CapabilityError, UsageError
from tests.engines.bundles import write_bundle
from tests.engines.tensorrt.real_builds import int4_linear, quantized_conv


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process that would call the library."""

    def started(*_: Any) -> None:
        raise AssertionError("the builder was started")

    monkeypatch.setattr(builder, "build_in_child", started)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_a_bundle_of_another_target(target: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", facts={"target": target})
    with pytest.raises(
        CapabilityError, match=f"made for the target {target}, and tensorrt-rtx reads"
    ) as caught:
        build_engine(bundle, tmp_path / "engine", backend="tensorrt-rtx", gpu="sm89")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_a_library_that_is_not_installed(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, flavour.module, None)
    with pytest.raises(CapabilityError, match="pip install 'qdeploy") as caught:
        load_tensorrt(flavour)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.5.0.114", "1.6.1.120"])
def test_int8_convolutions_of_versions_that_have_none(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "load_tensorrt", lambda _: SimpleNamespace(__version__=version))
    with pytest.raises(CapabilityError, match=r"has no int8 convolutions, 1\.7 has them"):
        build(quantized_conv(tmp_path / "model.onnx"), tmp_path / "engine", precision="f16", gpu="sm89")
    assert not list((tmp_path / "engine").glob("*"))


def test_int4_on_turing(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="int4 needs sm80 or newer, and sm75 was asked for"):
        build(int4_linear(tmp_path / "model.onnx"), tmp_path / "engine", precision="f16", gpu="sm75")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_shapes_that_the_graph_does_not_take(flavour: Flavour, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names 'latents', but the graph takes sample, timestep") as caught:
        builder.build(
            quantized_conv(tmp_path / "model.onnx"),
            tmp_path / "engine",
            flavour=flavour,
            shapes="latents:1x4x8x8",
        )
    assert caught.value.exit_code == 2
    assert not (tmp_path / "engine").exists()


def test_code_in_a_plan_that_nobody_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST, raising=False)
    with pytest.raises(CapabilityError, match=f"set {TRUST}=1"):
        builder.build(quantized_conv(tmp_path / "model.onnx"), tmp_path / "engine", version_compatible=True)
    assert not (tmp_path / "engine").exists()
