"""Graphs that name files elsewhere as the home of their weights are refused before anything is copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qdeploy.engines.build import build_engine, load_engine
from qdeploy.export.graph.external import check_external, external_files
from qdeploy.export.lint.run import lint
from qdeploy.store.artifact import Artifact, Bundle
from qdeploy.store.manifest import read_manifest
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_file
from tests.engines.bundles import write_bundle
from tests.helpers import reseal


def graph_with(location: str, path: Path, where: str = "initializer") -> Path:
    """A graph whose only weights lie in the file of that name."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if where == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weights))
    stored = [weights] if where == "initializer" else []
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("where", ["initializer", "constant"])
@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret", "..\\secret", ".."])
def test_a_location_elsewhere_is_refused(tmp_path: Path, location: str, where: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    folder = tmp_path / "folder"
    folder.mkdir()
    graph = graph_with(location, folder / "model.onnx", where)
    with pytest.raises(InvalidInputError, match=r"not a file of its own folder|which is not a plain path"):
        external_files(graph)
    assert [finding.rule for finding in lint(graph).findings] == ["TRT048"]
    assert not lint(graph, target="openvino").passed


def test_a_file_beside_the_graph_is_read_and_a_link_there_is_not(tmp_path: Path) -> None:
    graph = graph_with("weights", tmp_path / "model.onnx")
    with pytest.raises(InvalidInputError, match="missing"):
        check_external(graph)
    (tmp_path / "weights").write_bytes(bytes(16))
    assert external_files(graph) == ["weights"]
    with pytest.raises(InvalidInputError, match="does not list"):
        check_external(graph, ["model.onnx"])
    (tmp_path / "weights").unlink()
    (tmp_path / "weights").symlink_to("/etc/hostname")
    with pytest.raises(InvalidInputError, match="link to outside"):
        check_external(graph)
    assert [finding.rule for finding in lint(graph).findings] == ["TRT048"]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_bundle_with_such_a_graph_writes_and_reads_nothing(tmp_path: Path, backend: str) -> None:
    bundle = write_bundle(tmp_path / "onnx")
    assert isinstance(bundle, Bundle)
    model = onnx.load(bundle.graph)
    tensor = model.graph.initializer[0]
    (tmp_path / "victim").write_bytes(tensor.raw_data or b"0" * 1024)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../victim")
    bundle.graph.write_bytes(model.SerializeToString())
    reseal(bundle.path)
    before = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    with pytest.raises(InvalidInputError, match="not a file of its own folder"):
        build_engine(bundle.path, tmp_path / "engine", backend=backend)
    after = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert after == before


def in_the_hubs_cache(made: Artifact, folder: Path) -> Path:
    """An artifact as the Hub's client keeps it: every file a link to a blob, four folders away."""
    snapshot = folder / "models--owner--name" / "snapshots" / "0f3a"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in made.path.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(made.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_weights_beside_a_graph_in_the_hubs_cache_are_read_through_their_links(
    tmp_path: Path, backend: str
) -> None:
    plain = write_bundle(tmp_path / "plain")
    bundle = with_weights_beside(plain)
    assert (bundle.graph.parent / "model.onnx_data").is_file()
    snapshot = in_the_hubs_cache(bundle, tmp_path / "bundle")
    lint(snapshot)
    engine = build_engine(snapshot, tmp_path / "engine", backend=backend, threads=1)
    inputs = bundle.probe().inputs
    expected = load_engine(build_engine(bundle, tmp_path / "direct", backend=backend, threads=1))(inputs)
    assert load_engine(engine)(inputs).equal(expected)
    # The engine's own files may lie in the cache too.
    assert load_engine(in_the_hubs_cache(engine, tmp_path / "hub"))(inputs).equal(expected)
    # Links to anywhere else are refused.
    data = snapshot / "unet" / "model.onnx_data"
    shutil.copy(data, tmp_path / "elsewhere")
    data.unlink()
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match="link to outside"):
        build_engine(snapshot, tmp_path / "other", backend=backend)


def with_weights_beside(bundle: Artifact) -> Bundle:
    """The same bundle with the weights in a file of their own."""
    assert isinstance(bundle, Bundle)
    model = onnx.load(bundle.graph)
    onnx.save_model(
        model, bundle.graph, save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    name = f"{bundle.component}/model.onnx_data"
    digest = sha256_file(bundle.path / name)
    reseal(bundle.path, lambda manifest: manifest["files"].update({name: digest}))
    return Bundle(bundle.path, read_manifest(bundle.path))


def test_a_graph_whose_names_are_no_text_is_refused(tmp_path: Path) -> None:
    graph = graph_with("weights", tmp_path / "model.onnx")
    (tmp_path / "weights").write_bytes(bytes(16))
    content = graph.read_bytes()
    graph.write_bytes(content.replace(b"Add", b"A\xffd"))
    with pytest.raises(InvalidInputError, match="names in it are no text"):
        external_files(graph)
    graph.write_bytes(content)
    assert external_files(graph) == ["weights"]
