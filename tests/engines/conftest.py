from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.engines.base import Engine
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.store.artifact import Artifact
from tests.engines.bundles import write_bundle


@pytest.fixture(scope="session")
def quantized_bundle(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "quantized")


@pytest.fixture(scope="session")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "float", quantized=False)


@pytest.fixture(scope="session", params=["openvino", "onnxruntime"])
def engine_folder(
    request: pytest.FixtureRequest, quantized_bundle: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("engines") / request.param
    return build_engine(quantized_bundle, output, backend=request.param, threads=1).path


@pytest.fixture
def engine(engine_folder: Path) -> Iterator[Engine]:
    with load_engine(engine_folder) as engine:
        yield engine
