"""Compiled models that are kept: found again, never trusted blindly, never of another processor."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qdeploy.engines import blobs
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.openvino import OpenVINOEngine
from qdeploy.engines.openvino_shapes import ShapedModel
from qdeploy.store.artifact import Artifact
from tests.engines.bundles import example_inputs
from tests.helpers import pretend_processor


@pytest.fixture(scope="module")
def artifact(quantized_bundle: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_engine(
        quantized_bundle, tmp_path_factory.mktemp("blobs") / "engine", backend="openvino", threads=1
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blobs"


def called(artifact: Artifact, rows: int = 2) -> torch.Tensor:
    with load_engine(artifact) as engine:
        return engine(inputs(rows))


def inputs(rows: int) -> dict[str, torch.Tensor]:
    """Rows of one timestep, so that one call serves them."""
    return {"sample": example_inputs(rows)["sample"], "timestep": torch.tensor(7.5)}


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(self: ShapedModel, inputs: object) -> None:
        raise AssertionError("compiled although a blob was kept")

    monkeypatch.setattr(ShapedModel, "compile_for", compile_nothing)


def test_what_was_compiled_is_found_again_and_computes_the_same(
    artifact: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = called(artifact)
    assert len(list(cache.iterdir())) == 1
    called(artifact, rows=1)  # other shapes are another blob
    assert len(list(cache.iterdir())) == 2
    forbid_compiling(monkeypatch)
    assert torch.equal(called(artifact), first)


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "of another model"])
def test_a_damaged_blob_is_compiled_again(
    artifact: Artifact,
    cache: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = called(artifact)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    data = bytearray(whole)
    data[-len(data) // 3] ^= 1
    head, _, blob = whole.partition(b"\n")
    other = head.replace(b'"openvino 2', b'"openvino 1') + b"\n" + blob
    path.write_bytes(
        {"flipped": bytes(data), "cut": whole[:-9], "emptied": b"", "of another model": other}[damage]
    )
    capsys.readouterr()
    assert torch.equal(called(artifact), first)
    assert "is damaged: compiling it again" in capsys.readouterr().err
    forbid_compiling(monkeypatch)
    assert torch.equal(called(artifact), first)


def test_a_blob_that_the_runtime_refuses_is_compiled_again(
    artifact: Artifact, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = called(artifact)
    with load_engine(artifact) as engine:
        assert isinstance(engine, OpenVINOEngine)
        shaped = engine.shaped
        assert shaped.blobs is not None
        request = {"shapes": {"sample": [2, 3, 6, 6], "timestep": []}, "options": shaped.options}
        assert shaped.blobs.read(request) is not None
        shaped.blobs.write(request, b"whole, and no model")
    assert torch.equal(called(artifact), first)
    assert "cannot load its compiled model" in capsys.readouterr().err


def test_another_processor_compiles_for_itself_and_says_so(
    artifact: Artifact,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512_vnni", "Testor 1")
    called(artifact)
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512_vnni", "Testor 2")
    capsys.readouterr()
    called(artifact)
    told = capsys.readouterr().err
    assert "compiled for another processor (Testor 1): compiling it again for Testor 2" in told
    pretend_processor(monkeypatch, tmp_path, "avx2", "Testor 2")  # the name alone does not tell
    called(artifact)
    assert len(list(cache.iterdir())) == 3
    pretend_processor(monkeypatch, tmp_path, "avx2 avx512_vnni", "Testor 1")
    forbid_compiling(monkeypatch)
    called(artifact)


def test_the_blobs_that_were_not_used_for_longest_make_room(
    artifact: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called(artifact, rows=1)
    (first,) = cache.iterdir()
    monkeypatch.setattr(blobs, "MOST_BYTES", int(1.5 * first.stat().st_size))
    called(artifact, rows=2)
    (left,) = cache.iterdir()
    assert left != first


def test_a_cache_that_cannot_be_written_stops_nobody(
    artifact: Artifact, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = called(artifact)
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    assert torch.equal(called(artifact), first)
    assert "cannot keep compiled models" in capsys.readouterr().err


PROGRAM = """
import sys, time
from pathlib import Path
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.system.errors import UsageError
from tests.engines.bundles import example_inputs
ready, go = Path(sys.argv[3]), Path(sys.argv[4])
ready.touch()
while not go.exists():
    time.sleep(0.01)
try:
    build_engine(sys.argv[1], sys.argv[2], backend="openvino", threads=1)
except UsageError as error:  # the other one holds the lock
    assert "another process" in str(error), error
    while not Path(sys.argv[2]).exists():
        time.sleep(0.05)
with load_engine(sys.argv[2]) as engine:
    print(engine(example_inputs(2)).double().sum().item())
"""


def test_two_processes_that_build_and_compile_at_once_do_not_harm_each_other(
    quantized_bundle: Artifact, artifact: Artifact, cache: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    processes = []
    for name in ("one", "two"):
        arguments = [str(quantized_bundle.path), str(tmp_path / "engine"), str(tmp_path / name), str(go)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    while not all((tmp_path / name).exists() for name in ("one", "two")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    go.touch()
    told = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert len({output for output, _ in told}) == 1
    assert [path.suffix for path in cache.iterdir()] == [".blob"]  # whole, and nothing half-written beside it
    assert load_engine(tmp_path / "engine").sha256 == artifact.sha256
