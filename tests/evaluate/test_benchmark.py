"""Speed is told beside full precision and 16 bits of the same model, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result

from qdeploy.engines import timing
from qdeploy.engines.build import build_engine
from qdeploy.engines.timing import quantile, take_turns
from qdeploy.evaluate import benchmark as benchmarking
from qdeploy.evaluate.baselines import baseline_precisions, enter, is_baseline
from qdeploy.evaluate.benchmark import benchmark
from qdeploy.model.origin import source_model
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.machine import has_bf16, int8_sums_saturate
from tests.engines.bundles import write_bundle
from tests.evaluate.conftest import Way
from tests.models import ddpm_folder

Run = Callable[..., Result]
QUICK: dict[str, Any] = {"rounds": 3, "seconds": 1.0}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)


def test_the_json_object_has_the_promised_keys(way: Way) -> None:
    result = benchmark([way.engine], batch=(1, 2), **QUICK)
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    kinds = baseline_precisions("openvino")
    assert len(value["results"]) == 2 * (1 + len(kinds))
    for measured in value["results"]:
        assert {"path", "backend", "precision", "batch", "ms", "size_mb", "int8_mac_share"} <= measured.keys()
        assert measured["ms"].keys() == {"median", "p95"}
        assert 0 < measured["ms"]["median"] <= measured["ms"]["p95"]
    assert value["ratios"].keys() == {
        f"w8a8-engine vs {kind}, batch {size}" for kind in kinds for size in (1, 2)
    }
    assert value["machine"]["cpu"]
    assert value["threads"] == 1
    assert "w8a8-engine" in result.table()
    assert result.markdown().count("\n") == 2 + len(value["results"])


def test_the_precisions_and_integer_shares_are_the_engines_own(way: Way) -> None:
    results = {r["precision"]: r for r in benchmark([way.engine], **QUICK).results}
    assert results.keys() == {"W8A8", *baseline_precisions("openvino")}
    # Without VNNI, 8-bit weights are computed in floats.
    assert (results["W8A8"]["int8_mac_share"] > 0.5) != int8_sums_saturate()
    assert results["f32"]["int8_mac_share"] == 0
    weights = way.engine.file("unet/openvino_model.bin").stat().st_size
    assert results["W8A8"]["size_mb"] > weights / 1e6


def test_one_batch_size_needs_no_mention(way: Way) -> None:
    assert "w8a8-engine vs f32" in benchmark([way.engine.path], **QUICK).ratios


@pytest.mark.slow
def test_an_engine_in_full_precision_is_its_own_baseline(
    way: Way, full_bundle: Artifact, tmp_path: Path
) -> None:
    full = build_engine(full_bundle, tmp_path / "mine", backend="openvino", threads=1)
    assert is_baseline(full)
    ratios = benchmark([way.engine, full], **QUICK).ratios
    assert "w8a8-engine vs f32" in ratios
    assert "mine vs f32" not in ratios


def test_the_model_is_found_or_asked_for(way: Way, tmp_path: Path) -> None:
    assert source_model(way.engine).path.samefile(way.model)
    with pytest.raises(InvalidInputError, match="was not made from"):
        source_model(way.engine, ddpm_folder(tmp_path / "other", seed=1))
    lost = build_engine(write_bundle(tmp_path / "lost-onnx"), tmp_path / "lost", backend="openvino")
    with pytest.raises(InvalidInputError, match="--reference"):
        benchmark([lost], **QUICK)


def test_names_tell_engines_apart(way: Way, tmp_path: Path) -> None:
    same_name = tmp_path / "w8a8-engine"
    twin = build_engine(way.onnx, same_name, backend="openvino", threads=1)
    clash = build_engine(way.onnx, tmp_path / "f32", backend="openvino", threads=1)
    names = [entrant.name for entrant in enter([way.engine, twin, clash, way.engine], None)]
    assert len(set(names)) == len(names)
    assert str(same_name) in names
    assert names[0] == "f32"


@pytest.mark.parametrize("wrong", [{"paths": []}, {"batch": 0}, {"batch": ()}, {"rounds": 0}, {"threads": 0}])
def test_impossible_requests_are_refused(way: Way, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        benchmark(**{"paths": [way.engine], **wrong})


def test_only_engines_have_a_speed(way: Way) -> None:
    with pytest.raises(InvalidInputError, match="'engine' is needed"):
        benchmark([way.onnx])


def test_sixteen_bits_take_a_processor_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baseline_precisions("onnxruntime") == ["f32"]
    monkeypatch.setattr("qdeploy.evaluate.baselines.has_bf16", lambda: False)
    assert baseline_precisions("openvino") == ["f32"]


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16")
def test_sixteen_bits_are_a_baseline_where_they_can_be() -> None:
    assert baseline_precisions("openvino") == ["f32", "bf16"]


def test_engines_take_turns_and_nobody_always_follows_the_same_one() -> None:
    called: list[str] = []

    def engine(name: str) -> Any:
        return lambda inputs: called.append(name)

    engines = {name: engine(name) for name in "abc"}
    turns = take_turns(engines, {name: {"x": torch.ones(1)} for name in engines}, 3, 60.0, "test")
    assert [len(turns[name]) for name in "abc"] == [3, 3, 3]
    assert called[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up
    in_order = [name for index, name in enumerate(called[6:]) if index % 2 == 0]
    assert "".join(in_order) == "abcbcacab"


def test_slow_engines_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def slow(inputs: Any) -> None:
        clock.now += 100

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    engines: Any = {"slow": slow}
    turns = take_turns(engines, {"slow": {}}, 30, 1.0, "test")
    assert len(turns["slow"]) == timing.LEAST_ROUNDS
    assert turns["slow"][0] == [100_000]


@pytest.mark.slow
def test_engines_that_are_too_large_together_are_loaded_one_at_a_time(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    together = benchmark([way.engine], **QUICK)
    load = benchmarking.load_timed

    def watched(artifact: Artifact, threads: int | None) -> Any:
        engine = load(artifact, threads)
        close = engine.close
        loaded.append(artifact.sha256)
        monkeypatch.setattr(engine, "close", lambda: (loaded.remove(artifact.sha256), close()))
        assert len(loaded) == 1
        return engine

    monkeypatch.setattr(benchmarking, "load_timed", watched)
    monkeypatch.setattr(benchmarking, "physical_memory", lambda: 1)
    found = benchmark([way.engine], **QUICK)
    assert loaded == []
    for ours, theirs in zip(found.results, together.results, strict=True):
        assert (ours["name"], ours["int8_mac_share"]) == (theirs["name"], theirs["int8_mac_share"])
    assert found.ratios.keys() == together.ratios.keys()


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert quantile(values, 0.95) == 95
    assert quantile([7.0], 0.95) == quantile([7.0], 0.0) == 7


def test_the_command_prints_the_same_object(qdeploy: Run, way: Way) -> None:
    result = qdeploy("benchmark", way.engine.path, "--rounds", 3, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    assert {"results", "ratios"} <= json.loads(result.stdout).keys()
    assert isinstance(way.engine, Artifact)
