"""The steps of a build over the real library of TensorRT for RTX, in this process: what each sets, refuses and keeps.

Both TensorRTs are built with by this code. `test_rtx_builds.py` has whole builds, in a process of their own.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdeploy.engines.tensorrt import builder
from qdeploy.engines.tensorrt.builder import FLAGS, build_plan, configure
from qdeploy.engines.tensorrt.graph import GraphTensor, read_graph
from qdeploy.engines.tensorrt.logger import create, logger_of
from qdeploy.engines.tensorrt.options import Options
from qdeploy.engines.tensorrt.profiles import parse_shapes
from qdeploy.engines.tensorrt.progress import monitor_class
from qdeploy.engines.tensorrt.timing_cache import load_cache, save_cache
from qdeploy.system.errors import CapabilityError, InvalidInputError
from tests.engines.tensorrt.bench import ADA
from tests.engines.tensorrt.real_builds import quantized_conv

trt = pytest.importorskip(
    "tensorrt_rtx", reason="needs the package tensorrt-rtx, which the extra dev installs"
)
SHAPES = "sample:1x32x8x8,2x32x8x8,4x32x8x8"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return quantized_conv(tmp_path / "model.onnx")


def build(path: Path, shapes: str = SHAPES, **change: Any) -> bytes:
    """A plan for SM89; ``change`` is for the description of the graph and for the options."""
    described = replace(read_graph(path), **{key: change.pop(key) for key in ("inputs",) if key in change})
    plan = build_plan(trt, path, described, parse_shapes(shapes), Options(**change), ADA, (89,))
    return bytes(memoryview(plan))


def configured(**options: Any) -> Any:
    """A configuration of the library's, with these options set."""
    config = create(trt.Builder, logger_of(trt), logger=logger_of(trt)).create_builder_config()
    configure(trt, config, Options(**options))
    return config


def test_every_wish_reaches_the_configuration() -> None:
    plain = configured()
    assert plain.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert plain.max_aux_streams == 0
    assert plain.get_flag(trt.BuilderFlag.TF32)
    asked = configured(workspace=1.5, optimization_level=4)
    assert asked.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 * 2**29
    assert (plain.builder_optimization_level, asked.builder_optimization_level) == (3, 4)
    for wish, name in FLAGS.items():
        flag = getattr(trt.BuilderFlag, name)
        assert configured(**{wish: True}).get_flag(flag)
        assert not plain.get_flag(flag)


def test_a_plan_is_built_for_profiles_one_after_the_other(graph: Path) -> None:
    one, two = build(graph), build(graph, f"{SHAPES}|sample:8x32x8x8")
    assert 1000 < len(one) < len(two)


def test_no_plan_is_an_error_with_the_reason(graph: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot build model\.onnx: .*tensor has 32") as caught:
        build(graph, "sample:1x31x8x8")
    assert "\n" not in str(caught.value)


def test_a_refused_profile_is_an_error(graph: Path) -> None:
    with pytest.raises(InvalidInputError, match="refuses profile 0: sample:4x32x8x8,2x32x8x8,1x32x8x8"):
        build(graph, "sample:4x32x8x8,2x32x8x8,1x32x8x8")


def test_a_network_of_other_types_is_refused(graph: Path) -> None:
    sample, timestep = read_graph(graph).inputs
    with pytest.raises(InvalidInputError, match=r"'sample' is float16 of 4 axes, but .* \('float32', 4\)"):
        build(graph, inputs=(replace(sample, dtype="float16"), timestep))
    with pytest.raises(InvalidInputError, match="dropped the input 'labels'"):
        build(graph, inputs=(sample, timestep, GraphTensor("labels", "int64", ("batch",))))


@pytest.mark.parametrize("nothing", ["None", "a null pointer"])
def test_a_library_that_gives_no_object_cannot_start(nothing: str) -> None:
    def make() -> None:
        if nothing != "None":
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(CapabilityError, match="TensorRT cannot start"):
        create(make, logger=logger_of(trt))


def test_the_logger_lives_as_long_as_the_process(graph: Path) -> None:
    build(graph)
    logger = weakref.ref(logger_of(trt))
    gc.collect()
    assert logger() is not None
    assert logger_of(trt) is logger()
    logger().log("a severity that is none", None)  # must not raise into TensorRT


@pytest.mark.parametrize("stop", [False, True])
def test_progress_can_be_watched_and_stopped(
    graph: Path, stop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(monitor_class(trt)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.began: list[str] = []
            self.steps = 0
            self.closed = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.began.append(phase_name)
            super().phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.steps += 1
            self.stopped = stop
            return bool(super().step_complete(phase_name, step))

        def close(self) -> None:
            self.closed = True
            super().close()

    monitor = Watched()
    monkeypatch.setattr(builder, "make_monitor", lambda trt: monitor)
    if stop:
        with pytest.raises(InvalidInputError, match="canceled by user"):
            build(graph)
        assert monitor.steps < 5
    else:
        build(graph)
        assert monitor.steps > 20
    assert len(monitor.began) > 1
    assert monitor.tasks == {}  # every phase was finished
    assert monitor.closed


def test_the_timing_cache_is_kept_and_a_foreign_one_replaced(graph: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.mkdir()
    build(graph, timing_cache=place)
    (kept,) = place.glob("*.timing")
    assert kept.name == f"trt{trt.__version__}-sm89-Fake-Ada.timing"
    content = kept.read_bytes()
    kept.write_bytes(b"of another library" * 50)
    build(graph, timing_cache=place)
    assert kept.read_bytes() == content


class Timings(set[str]):
    """As the library's cache: made of bytes, merged with others."""

    def combine(self, other: set[str], ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self |= other
        return True

    def serialize(self) -> bytes:
        return ",".join(sorted(self)).encode()


class Config:
    """The calls about a timing cache; names and arguments are checked in test_conformance.py."""

    def __init__(self) -> None:
        self.cache = Timings()

    def create_timing_cache(self, blob: bytes) -> Timings:
        return Timings(filter(None, blob.decode().split(",")))

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "foreign" in cache:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Timings:
        return self.cache


def test_what_another_build_measured_meanwhile_is_kept_too(tmp_path: Path) -> None:
    """Without a GPU the library measures nothing: timings are played."""
    file = tmp_path / "cache.timing"
    file.write_bytes(b"conv")
    ours, others = Config(), Config()
    for config, measured in ((ours, "gemm"), (others, "norm")):
        load_cache(config, file)
        config.cache.add(measured)
    save_cache(others, file)
    save_cache(ours, file)
    assert file.read_bytes() == b"conv,gemm,norm"


def test_a_cache_that_the_library_refuses_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cache.timing"
    file.write_bytes(b"foreign")
    config = Config()
    load_cache(config, file)
    assert f"does not take the timing cache {file}" in capsys.readouterr().err
    assert config.cache == set()
