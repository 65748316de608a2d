from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qdeploy.engines
from qdeploy.engines.registry import backends, find_backend
from qdeploy.system.errors import CapabilityError, UsageError
from tests.plugins import install

NEW = """
from qdeploy.engines.registry import Backend
BACKEND = Backend("abacus", "beads on wires", "abacus_runtime", "abacus-runtime", print, print, rank=99)
"""


def test_backends_are_found_and_described() -> None:
    assert {"openvino", "onnxruntime", "tensorrt"} <= backends().keys()
    assert all(backend.description for backend in backends().values())
    assert find_backend("auto").name == "openvino"


def test_every_backend_of_the_package_is_listed() -> None:
    package = Path(qdeploy.engines.__file__).parent
    defining = [path for path in package.rglob("*.py") if "\nBACKEND = Backend(" in path.read_text()]
    assert len(backends()) == len(defining) == 6


def test_the_list_of_backends_imports_them_alone() -> None:
    program = (
        "import sys; from qdeploy.engines.registry import backends; backends(); "
        "print([m for m in ('build', 'floor', 'components', 'doctor') if f'qdeploy.engines.{m}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_registers_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"qdeploy.engines": {"abacus": "my_package.abacus"}}, abacus=NEW)
    assert next(iter(backends())) == "abacus"
    with pytest.raises(CapabilityError, match="pip install abacus-runtime"):
        find_backend("abacus")
    assert find_backend("auto").name == "openvino"  # the best of those that are installed


def test_a_missing_package_is_a_missing_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(CapabilityError, match="pip install openvino") as error:
        find_backend("openvino")
    assert error.value.exit_code == 4
    with pytest.raises(CapabilityError, match="pip install openvino"):
        find_backend("auto")  # onnxruntime is the oracle; nobody gets it without asking


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown backend 'magic'") as error:
        find_backend("magic")
    assert error.value.exit_code == 2


def test_the_list_of_backends_needs_no_runtime() -> None:
    program = (
        "import sys; from qdeploy.engines.registry import backends; backends(); "
        "print([m for m in ('torch', 'openvino', 'onnxruntime', 'onnx', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
