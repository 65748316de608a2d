from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result

from qdeploy.engines import doctor as module
from qdeploy.engines.doctor import doctor
from qdeploy.engines.registry import backends
from qdeploy.system.errors import CapabilityError

QDeploy = Callable[..., Result]


def test_it_tells_of_every_backend(qdeploy: QDeploy) -> None:
    result = qdeploy("doctor", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["backends"].keys() == backends().keys()
    assert told["backends"]["openvino"]["usable"]
    for found in told["backends"].values():
        assert found["usable"] == ("problem" not in found)
    assert told["machine"]["cores"] >= 1
    assert told["versions"]["torch"]


def test_the_text_says_what_is_missing(qdeploy: QDeploy, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise CapabilityError("no beads: buy some")

    import dataclasses

    monkeypatch.setitem(backends(), "openvino", dataclasses.replace(backends()["openvino"], check=absent))
    result = qdeploy("doctor")
    assert result.exit_code == 0
    assert "--  openvino: no beads: buy some" in result.stdout
    assert "ok  onnxruntime" in result.stdout
    refused = qdeploy("doctor", "--require", "openvino")
    assert refused.exit_code == 4
    assert refused.stderr == "qdeploy: no beads: buy some\n"


def test_what_is_required_and_there_is_fine(qdeploy: QDeploy) -> None:
    assert qdeploy("doctor", "--require", "onnxruntime").exit_code == 0
    assert qdeploy("doctor", "--require", "abacus").exit_code == 2


def test_tensorrt_can_be_required(qdeploy: QDeploy) -> None:
    if backends()["tensorrt"].available():
        pytest.skip("this machine has a GPU")
    result = qdeploy("doctor", "--require", "tensorrt")
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1


def test_a_broken_installation_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    broken = dataclasses.replace(backends()["onnxruntime"], package="this", check=None)
    monkeypatch.setitem(backends(), "onnxruntime", broken)
    found = doctor().backends["onnxruntime"]
    assert not found["usable"]
    assert "installed but fails" in found["problem"]


def test_advice_follows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(module, "installed_version", versions.get)
    monkeypatch.setattr(module, "cpu_features", lambda: ["avx2"])
    monkeypatch.setattr(module, "has_int8", lambda: False)
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    told = "\n".join(module.advice_for({"name": "Test GPU"}))
    for words in ("int8 gains less", "compute in f32", "torch is built without CUDA", "uninstall both"):
        assert words in told
    monkeypatch.setattr(module, "has_int8", lambda: True)
    monkeypatch.setattr(module, "has_bf16", lambda: True)
    monkeypatch.setattr(module, "installed_version", {}.get)
    assert module.advice_for({"name": None}) == []
