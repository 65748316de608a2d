"""Packages in real servers: Triton (of the wheel nvidia-pytriton) and KServe answer with the pictures of `sample`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import EngineFolder
from qdeploy.workflows.packaging.run import package
from tests.environments import ROOT, environment, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Triton 2.51 (24.10) lies in this wheel, with its Python backend alone; its model needs NumPy 1.
TRITON = ("nvidia-pytriton==0.7.0", "tritonclient[grpc,http]==2.73.0", "numpy<2")
KSERVE = ("kserve==0.21.0", "tritonclient[http]==2.73.0")
PROMPT, STEPS, GUIDANCE, IMAGES = "a cat", 2, 4.0, 4

_CLIENT = """
import concurrent.futures, json, sys, urllib.error, urllib.request
import numpy
protocol, place, file = sys.argv[1:]
if protocol == "grpc":
    import tritonclient.grpc as protocol_client
else:
    import tritonclient.http as protocol_client
expected = numpy.load(file)

def tensor(name, values, dtype, kind):
    values = numpy.array(values, dtype=dtype)
    made = protocol_client.InferInput(name, values.shape, kind)
    made.set_data_from_numpy(values)
    return made

def ask(seeds, prompt=b"a cat", steps=2, guidance=4.0):
    inputs = [tensor("SEED", [[seed] for seed in seeds], "int64", "INT64")]
    if prompt is not None:
        inputs.append(tensor("PROMPT", [[prompt]] * len(seeds), object, "BYTES"))
    inputs.append(tensor("STEPS", [[steps]] * len(seeds), "int32", "INT32"))
    inputs.append(tensor("GUIDANCE", [[guidance]] * len(seeds), "float32", "FP32"))
    options = {} if protocol == "grpc" else {"network_timeout": 600, "connection_timeout": 600}
    return protocol_client.InferenceServerClient(place, **options).infer("sd", inputs).as_numpy("IMAGES")

def status(**asked):
    try:
        return str(ask(**{"seeds": [0], **asked}).shape)
    except protocol_client.InferenceServerException as error:
        return str(error.status())

together = ask(range(len(expected)))
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    several = list(pool.map(lambda number: ask([number % len(expected)])[0], range(16)))
wrong = {
    "steps": status(steps=-1), "guidance": status(guidance=float("nan")), "seed": status(seeds=[-5]),
    "long": status(prompt=b"x" * 10_000_000), "bytes": status(prompt=b"\\xff"), "missing": status(prompt=None),
}
garbage = 400
if protocol == "http":
    request = urllib.request.Request(f"http://{place}/v2/models/sd/infer", b"{garbage", method="POST")
    try:
        urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        garbage = error.code
print(json.dumps({
    "together": bool((together == expected).all()),
    "several": [bool((one == expected[number % len(expected)]).all()) for number, one in enumerate(several)],
    "wrong": wrong, "garbage": garbage, "after": bool((ask([1])[0] == expected[1]).all()),
}))
"""


@pytest.fixture(scope="module")
def expected(stable_diffusion_engine: EngineFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `qdeploy sample`."""
    folder = tmp_path_factory.mktemp("expected")
    options: dict[str, Any] = {"prompts": [PROMPT], "steps": STEPS, "guidance": GUIDANCE}
    made = sample(stable_diffusion_engine, folder / "samples", samples=IMAGES, **options)
    np.save(folder / "images.npy", load_file(made.images)["images"].movedim(1, -1).numpy())
    return folder / "images.npy"


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment("triton", TRITON, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def kserve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment("kserve", KSERVE, tmp_path_factory.getbasetemp())


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def serving(
    command: list[str], port: int, log: Path, variables: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready to answer; it ends with the block."""
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **variables}, cwd=folder
        )
    try:
        wait_until_ready(server, port, log)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/sd/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.25)
    raise AssertionError(f"the server does not answer:\n{log.read_text(errors='replace')[-3000:]}")


def assert_all_right(told: dict[str, Any]) -> None:
    assert told["together"]
    assert told["several"] == [True] * 16
    wrong = told["wrong"]
    assert {
        name: code for name, code in wrong.items() if not code.startswith(("4", "StatusCode.INVALID"))
    } == {}
    assert told["garbage"] >= 400  # servers refuse what is no JSON themselves; Triton with 500
    assert told["after"]


@contextmanager
def running_triton(
    python: Path, repository: Path, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int, int, int, Path]]:
    """The server of the wheel: process, ports of HTTP, gRPC and metrics, log."""
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    (site / "zz_qdeploy.pth").write_text(f"{ROOT}\n")  # Triton's Python ignores PYTHONPATH
    home = site / "pytriton" / "tritonserver"
    version = sysconfig.get_python_version()
    backend = folder / "backends" / "python"
    shutil.copytree(home / "backends" / "python", backend)
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    http, grpc, metrics = free_port(), free_port(), free_port()
    command = [
        str(home / "bin" / "tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={backend.parent}", "--exit-on-error=true",
        "--model-control-mode=explicit", "--load-model=sd",
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}",
    ]  # fmt: skip
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(site / "nvidia_pytriton.libs")]
    variables = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = folder / "log"
    with serving(command, http, log, variables, folder) as server:
        yield server, http, grpc, metrics, log


def executions(port: int) -> tuple[int, int]:
    """Requests that succeeded, and how often the model ran for them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()

    def of(name: str) -> int:
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(name + "{"))

    return of("nv_inference_request_success"), of("nv_inference_exec_count")


def workers(server: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    every = [int(child) for child in children]
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        every += [int(child) for child in (task / "children").read_text().split()]
    return sorted(set(every))


def test_triton_answers_with_the_pictures_of_sample(
    triton: Path, stable_diffusion_engine: EngineFolder, expected: Path, tmp_path: Path
) -> None:
    made = package(stable_diffusion_engine, tmp_path / "models", server="triton", name="sd")
    with running_triton(triton, made.path / "pipeline", tmp_path) as (server, http, grpc, metrics, _):
        before = executions(metrics)
        assert_all_right(run(triton, _CLIENT, "http", f"127.0.0.1:{http}", expected))
        succeeded, ran = (now - then for now, then in zip(executions(metrics), before, strict=True))
        assert ran < succeeded  # requests that came together were sampled together
        assert_all_right(run(triton, _CLIENT, "grpc", f"127.0.0.1:{grpc}", expected))

        script = (made.path / "client.py").read_text()
        words = [PROMPT, str(tmp_path / "one.npy"), str(STEPS), "0", f"127.0.0.1:{http}"]
        assert subprocess.run([str(triton), "-c", script, *words], timeout=600, check=False).returncode == 0
        assert np.load(tmp_path / "one.npy").shape == np.load(expected)[0].shape

        killed = workers(server)
        assert killed
        for process in killed:
            os.kill(process, 9)
        # Triton starts no other worker (server issue 8604), but lives, and loads the model anew when it is asked to.
        with pytest.raises(AssertionError, match="is not healthy"):
            run(triton, _CLIENT, "http", f"127.0.0.1:{http}", expected)
        for verb in ("unload", "load"):
            place = f"http://127.0.0.1:{http}/v2/repository/models/sd/{verb}"
            with urllib.request.urlopen(
                urllib.request.Request(place, b"{}", method="POST"), timeout=300
            ) as answer:
                assert answer.status == 200
        assert_all_right(run(triton, _CLIENT, "http", f"127.0.0.1:{http}", expected))
        assert server.poll() is None


def test_triton_with_arrays_that_it_reads_wrong_is_refused(
    stable_diffusion_engine: EngineFolder, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if int(np.__version__.partition(".")[0]) < 2:
        pytest.skip("needs NumPy 2")
    packages = ("--no-deps", TRITON[0], f"numpy=={np.__version__}")
    python = environment("triton-numpy2", packages, tmp_path_factory.getbasetemp())
    made = package(stable_diffusion_engine, tmp_path / "models", server="triton", name="sd")
    with (
        pytest.raises(AssertionError, match=r"reads NumPy 2\S* wrong"),
        running_triton(python, made.path / "pipeline", tmp_path),
    ):
        pass


def test_kserve_answers_with_the_pictures_of_sample(
    kserve: Path, stable_diffusion_engine: EngineFolder, expected: Path, tmp_path: Path
) -> None:
    made = package(stable_diffusion_engine, tmp_path / "served", server="kserve", name="sd")
    port = free_port()
    command = [str(kserve), "serve.py", "--http_port", str(port), "--enable_grpc", "false"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with serving(command, port, tmp_path / "log", variables, made.path) as server:
        told = run(kserve, _CLIENT, "http", f"127.0.0.1:{port}", expected)
        assert told["wrong"].pop("bytes") == "500"  # KServe's own answer to text that is no UTF-8
        assert_all_right(told)
        assert server.poll() is None
    assert json.loads((made.path / "package.json").read_text())["engine"] == stable_diffusion_engine.sha256
