"""The files that each model server expects next to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qdeploy.sampling.requests import INPUTS, PROMPT, RESULT, SEED
from qdeploy.version import __version__

_TRITON_TYPES = {"BYTES": "TYPE_STRING"}
_QUEUE_MICROSECONDS = 50_000  # how long a request waits for others to be sampled with it


@dataclass(frozen=True)
class PackagedEngine:
    """What is packaged.

    Attributes:
        name: of the model in requests.
        prompts: whether its pipeline takes prompts.
        gpu: whether its engines run on a GPU.
        batch: images that are sampled at once.
        whole: whether the engine is a whole pipeline, and not the denoiser alone.
    """

    name: str
    prompts: bool
    gpu: bool
    batch: int
    whole: bool = True


@dataclass(frozen=True)
class PackageLayout:
    """What a server expects.

    Attributes:
        description: one line.
        engine: where the engine lies in the package.
        files: texts by their places.
        backend: the only backend whose engines it runs; None for all.
        denoisers: whether it also takes engines that are the denoiser alone.
    """

    description: str
    engine: Callable[[PackagedEngine], str]
    files: Callable[[PackagedEngine], Mapping[str, str]]
    backend: str | None = None
    denoisers: bool = False


def _triton(subject: PackagedEngine) -> dict[str, str]:
    place = f"pipeline/{subject.name}"
    if not subject.whole:
        return {"README.md": _denoiser_readme(subject)}
    return {
        f"{place}/config.pbtxt": _pipeline_config(subject),
        f"{place}/1/model.py": '"""Images for prompts and seeds."""\n\n'
        "from qdeploy.workflows.packaging.triton_model import TritonPythonModel\n\n"
        '__all__ = ["TritonPythonModel"]\n',
        "client.py": _client(subject),
        "README.md": _readme(
            subject,
            "Triton Inference Server",
            [
                f"pip install 'qdeploy=={__version__}' 'tritonclient[http]'",
                "tritonserver --model-repository=pipeline --model-control-mode=explicit "
                f"--load-model={subject.name} --http-address=127.0.0.1 --grpc-address=127.0.0.1 "
                "--metrics-address=127.0.0.1",
            ],
            "The first command is for the Python that Triton runs models with: inside of a container "
            "`nvcr.io/nvidia/tritonserver:YY.MM-py3`, it is `python3`. Triton 24.10 and before also need "
            "`numpy<2`, and the model refuses to load without it.\n\n`pipeline/` holds the whole pipeline, on "
            f"Triton's Python backend: requests are batched up to {subject.batch} images. `denoiser/` holds the "
            "network alone for the runtime's own backend of Triton, for programs that have a sampler of their own; "
            "Triton completes its configuration from the file.\n\nA worker that dies, for want of memory say, is not "
            "started again by Triton 24.06 and later: requests fail with status 500, and the routes of health "
            "still say 200. Probe with a request, and load the model again:\n\n```shell\n"
            f"curl -X POST http://127.0.0.1:8000/v2/repository/models/{subject.name}/unload\n"
            f"curl -X POST http://127.0.0.1:8000/v2/repository/models/{subject.name}/load\n```\n",
        ),
    }


def _pipeline_config(subject: PackagedEngine) -> str:
    inputs = ",\n".join(
        f'  {{ name: "{name}" data_type: {_TRITON_TYPES.get(kind, f"TYPE_{kind}")} dims: [ 1 ]'
        f"{'' if name == SEED or (name == PROMPT and subject.prompts) else ' optional: true'} }}"
        for name, kind in INPUTS.items()
    )
    return (
        f'name: "{subject.name}"\nbackend: "python"\nmax_batch_size: {subject.batch}\n'
        f"input [\n{inputs}\n]\n"
        f'output [\n  {{ name: "{RESULT}" data_type: TYPE_UINT8 dims: [ -1, -1, -1 ] }}\n]\n'
        f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}\n{_instances(subject)}"
    )


def denoiser_config(subject: PackagedEngine, backend: str) -> str:
    """Triton's configuration of a network alone; what is not said, Triton reads off the file."""
    kind = 'platform: "tensorrt_plan"' if backend == "tensorrt" else f'backend: "{backend}"'
    return f'name: "{subject.name}"\n{kind}\nmax_batch_size: 0\n{_instances(subject)}'


def _denoiser_readme(subject: PackagedEngine) -> str:
    commands = [
        "docker run --rm --gpus all --net host -v $PWD:/models nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver "
        "--model-repository=/models/denoiser --http-address=127.0.0.1 --grpc-address=127.0.0.1 "
        "--metrics-address=127.0.0.1",
        f"curl http://127.0.0.1:8000/v2/models/{subject.name}/config",
    ]
    return (
        f"# {subject.name}, for Triton Inference Server\n\n```console\n" + "\n".join(commands) + "\n```\n\n"
        "This is the denoiser alone, for programs that have a sampler of their own. Triton completes the "
        "configuration from the file; the version of the container has to be that of the engine's runtime.\n"
    )


def _instances(subject: PackagedEngine) -> str:
    return f"instance_group [ {{ kind: {'KIND_GPU' if subject.gpu else 'KIND_CPU'} count: 1 }} ]\n"


def _kserve(subject: PackagedEngine) -> dict[str, str]:
    return {
        "serve.py": f'"""KServe\'s Python server with the pipeline in the folder of this file."""\n\n'
        "from pathlib import Path\n\n"
        "from qdeploy.workflows.packaging.kserve_model import serve\n\n"
        f'serve(Path(__file__).parent / "engine", "{subject.name}")\n',
        "client.py": _client(subject),
        "README.md": _readme(
            subject,
            "KServe",
            [
                f"pip install 'qdeploy=={__version__}' kserve 'tritonclient[http]'",
                "python serve.py --http_port 8000 --enable_grpc false",
            ],
            "KServe listens on all addresses: keep the port behind a firewall or inside of a cluster. In a cluster "
            "this folder is the custom predictor of an InferenceService, with the second command as the "
            "container's.\n",
        ),
    }


def _genai(subject: PackagedEngine) -> dict[str, str]:
    script = '''"""One image: python generate.py PROMPT FILE.png [STEPS] [SEED]"""

import sys
from pathlib import Path

import openvino_genai
from PIL import Image

prompt, file, steps, seed = [*sys.argv[1:], *("20", "0")[len(sys.argv) - 3 :]]
pipeline = openvino_genai.Text2ImagePipeline(str(Path(__file__).parent / "engine"), "CPU")
images = pipeline.generate(
    prompt, num_inference_steps=int(steps), generator=openvino_genai.TorchGenerator(int(seed))
)
Image.fromarray(images.data[0]).save(file)
'''
    return {
        "generate.py": script,
        "README.md": _readme(
            subject,
            "OpenVINO GenAI",
            ["pip install openvino-genai pillow torch", "python generate.py 'a cat' cat.png"],
            '`engine/` opens in GenAI\'s C++, C# and Node programs as well: `Text2ImagePipeline("engine", "CPU")`.\n',
            "It needs no qdeploy.",
        ),
    }


def _ovms(subject: PackagedEngine) -> dict[str, str]:
    graph = """input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {
  name: "ImageGenExecutor"
  calculator: "ImageGenCalculator"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "IMAGE_GEN_NODE_RESOURCES:pipes"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  node_options: {
    [type.googleapis.com / mediapipe.ImageGenCalculatorOptions]: {
      models_path: "./engine"
      device: "CPU"
    }
  }
}
"""
    name = subject.name
    return {
        f"{name}/graph.pbtxt": graph,
        "README.md": _readme(
            subject,
            "OpenVINO Model Server",
            [
                f"ovms --model_name {name} --model_path {name} --rest_port 8000 --rest_bind_address 127.0.0.1",
                "curl http://127.0.0.1:8000/v3/images/generations -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{name}", "prompt": "a cat"}}\'',
            ],
            "The route is that of OpenAI's API for images. The pipeline is the one that OpenVINO GenAI opens, which "
            "qdeploy's tests do; the server itself is not in them.\n",
            "It needs no qdeploy.",
        ),
    }


def _client(subject: PackagedEngine) -> str:
    prompt = (
        'prompt = array("PROMPT", [[sys.argv[1].encode()]], object, "BYTES")\n' if subject.prompts else ""
    )
    usage = "PROMPT FILE.npy" if subject.prompts else "FILE.npy"
    inputs = "[seed, steps, prompt]" if subject.prompts else "[seed, steps]"
    return f'''"""One image: python client.py {usage} [STEPS] [SEED] [HOST:PORT]"""

import sys

import numpy
import tritonclient.http


def array(name, values, dtype, kind):
    values = numpy.array(values, dtype=dtype)
    tensor = tritonclient.http.InferInput(name, values.shape, kind)
    tensor.set_data_from_numpy(values)
    return tensor


file, *rest = sys.argv[{2 if subject.prompts else 1}:]
count, number, place = [*rest, *("20", "0", "127.0.0.1:8000")[len(rest) :]]
seed = array("SEED", [[int(number)]], "int64", "INT64")
steps = array("STEPS", [[int(count)]], "int32", "INT32")
{prompt}client = tritonclient.http.InferenceServerClient(place, network_timeout=3600)
image = client.infer("{subject.name}", {inputs}).as_numpy("{RESULT}")[0]
numpy.save(file, image)  # uint8 [height, width, channels]
'''


def _readme(subject: PackagedEngine, server: str, commands: list[str], more: str, needs: str = "") -> str:
    shown = "\n".join(commands)
    asked = (
        f"A request holds `{'`, `'.join(INPUTS)}`, one value for each image; all but the seed"
        f"{' and the prompt' if subject.prompts else ''} may be left out. The answer is `{RESULT}`, uint8 "
        "`[N, H, W, C]`: the pictures that `qdeploy sample` makes for these seeds. `client.py` shows it.\n\n"
    )
    return (
        f"# {subject.name}, for {server}\n\n```console\n{shown}\n```\n\n{needs or asked.strip()}\n\n{more}\n"
        "`engine/` is an artifact of qdeploy's: its files are hashed, and verified when it is opened.\n"
    )


LAYOUTS = {
    "triton": PackageLayout(
        "NVIDIA's Triton Inference Server: the pipeline on its Python backend, the denoiser on its native ones",
        lambda subject: f"pipeline/{subject.name}/1/engine",
        _triton,
        denoisers=True,
    ),
    "kserve": PackageLayout("KServe's Python server", lambda subject: "engine", _kserve),
    "openvino-genai": PackageLayout(
        "programs with OpenVINO GenAI", lambda subject: "engine", _genai, "openvino"
    ),
    "ovms": PackageLayout(
        "OpenVINO Model Server", lambda subject: f"{subject.name}/engine", _ovms, "openvino"
    ),
}
