"""Artifacts through the Hub's own client, against a stand-in of its API: what comes back is what went out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from qdeploy.store.artifact import Artifact
from tests.store.hub_stand_in import TOKEN, Hub

# The client reads its settings when it is imported, so each of its calls has a process of its own.
_LOAD = """
import json, sys
import torch, qdeploy
try:
    with qdeploy.load_engine(sys.argv[1]) as engine:
        print(json.dumps({"path": str(engine.path), "sha256": engine.sha256}))
except qdeploy.system.errors.QDeployError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
        server.shutdown()


def push(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qdeploy.cli", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def load(name: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", _LOAD, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_was_pushed_is_loaded_by_its_name(hub: Hub, ddpm_engine: Artifact) -> None:
    told = json.loads(push(ddpm_engine.path, "me/engine", "--json").stdout)
    assert told["repository"] == "me/engine"
    assert told["url"].startswith(f"{hub.address}/me/engine/commit/")
    files = {
        path.relative_to(ddpm_engine.path).as_posix(): path.read_bytes()
        for path in ddpm_engine.path.rglob("*")
        if path.is_file()
    }
    stored = hub.files("me/engine")
    assert stored is not None
    assert {name: content for name, content in stored.items() if name != ".gitattributes"} == files
    found = load("me/engine")
    assert found["sha256"] == ddpm_engine.sha256
    assert Path(str(found["path"])) != ddpm_engine.path


@pytest.mark.slow
def test_sample_takes_an_engine_by_its_name(hub: Hub, ddpm_engine: Artifact, tmp_path: Path) -> None:
    assert push(ddpm_engine.path, "me/engine").returncode == 0
    made = []
    for source, output in ((ddpm_engine.path, "here"), ("me/engine", "hub")):
        command = [sys.executable, "-m", "qdeploy.cli", "sample", str(source), "-n", "2", "--steps", "2"]
        done = subprocess.run([*command, "-o", str(tmp_path / output)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.append((tmp_path / output / "images.safetensors").read_bytes())
    assert made[0] == made[1]


def test_revisions_are_branches_and_old_files_go(hub: Hub, ddpm_engine: Artifact) -> None:
    assert push(ddpm_engine.path, "me/engine", "--revision", "int8", "--private").returncode == 0
    assert hub.private == {"me/engine": True}
    assert set(hub.files("me/engine") or {}) == {".gitattributes"}
    assert load("me/engine@int8")["sha256"] == ddpm_engine.sha256
    assert "no artifact of qdeploy's" in str(load("me/engine")["error"])
    hub.commit("me/engine", "int8", {**(hub.files("me/engine", "int8") or {}), "left-over.bin": b"old"})
    assert push(ddpm_engine.path, "me/engine", "--revision", "int8").returncode == 0
    assert "left-over.bin" not in (hub.files("me/engine", "int8") or {})


def test_what_was_changed_on_the_hub_is_refused(hub: Hub, ddpm_engine: Artifact) -> None:
    assert push(ddpm_engine.path, "me/engine").returncode == 0
    files = dict(hub.files("me/engine") or {})
    files["scheduler/scheduler_config.json"] += b" "
    hub.commit("me/engine", "main", files)
    assert "damaged: the file scheduler/scheduler_config.json" in str(load("me/engine")["error"])


def test_names_and_tokens_that_do_not_fit_are_refused_in_a_sentence(
    hub: Hub, ddpm_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load("me/nothing")
    assert found["code"] == 5
    assert "me/nothing does not exist, and cannot be had from the Hub" in str(found["error"])
    for name in ("engine", "me/too/many", "me/"):
        done = push(ddpm_engine.path, name)
        assert (done.returncode, "owner/name" in done.stderr) == (2, True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = push(ddpm_engine.path, "me/engine")
    assert done.returncode == 4
    assert "cannot be written on the Hub" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert hub.branches == {}


def test_only_artifacts_are_pushed(hub: Hub, tmp_path: Path) -> None:
    done = push(tmp_path, "me/engine")
    assert done.returncode == 5
    assert "is not a qdeploy artifact" in done.stderr
    assert hub.branches == {}
