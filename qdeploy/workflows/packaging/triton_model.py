"""The model of Triton's Python backend: a packaged ``model.py`` imports it from here.

Tensors of numbers go through DLPack. Text has to go through NumPy, and Triton 24.10 and before read NumPy 2's arrays
wrong without a word (triton-inference-server/python_backend, pull request 384): the model refuses to load there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.sampling.requests import INPUTS, RESULT, ImageRequest, ServedPipeline, read_requests
from qdeploy.system.errors import CapabilityError, QDeployError

ENGINE = "engine"


class TritonPythonModel:
    """What Triton calls; its documentation gives the names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine in the folder of ``model.py``.

        Raises:
            CapabilityError: Triton and NumPy do not fit together.
            InvalidInputError: the engine is damaged.
        """
        import triton_python_backend_utils as server

        self._server: Any = server
        check_arrays(server)
        folder = Path(args["model_repository"]) / args["model_version"] / ENGINE
        parameters = json.loads(args["model_config"]).get("parameters", {})
        threads = parameters.get("threads", {}).get("string_value")
        self._pipeline = ServedPipeline(folder, None if threads is None else int(threads))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request: its images, or what is wrong with it as an invalid argument (HTTP 400)."""
        asked: list[list[ImageRequest] | QDeployError] = [self._read(request) for request in requests]
        flat = [each for one in asked if isinstance(one, list) for each in one]
        results = iter(self._pipeline(flat))
        answers = []
        for one in asked:
            if isinstance(one, list):
                images = [next(results) for _ in one]
                wrong = next((image for image in images if isinstance(image, QDeployError)), None)
                answers.append(self._images(images) if wrong is None else self._error(wrong))
            else:
                answers.append(self._error(one))
        return answers

    def _read(self, request: Any) -> list[ImageRequest] | QDeployError:
        from torch.utils.dlpack import from_dlpack

        columns: dict[str, list[Any]] = {}
        for name, kind in INPUTS.items():
            tensor = self._server.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = tensor.as_numpy() if kind == "BYTES" else from_dlpack(tensor)
                columns[name] = values.flatten().tolist()
        try:
            return read_requests(columns)
        except QDeployError as error:
            return error

    def _images(self, images: Sequence[Any]) -> Any:
        import torch

        tensor = self._server.Tensor.from_dlpack(RESULT, torch.stack(list(images)))
        return self._server.InferenceResponse(output_tensors=[tensor])

    def _error(self, error: QDeployError) -> Any:
        refusal = self._server.TritonError(str(error), self._server.TritonError.INVALID_ARG)
        return self._server.InferenceResponse(error=refusal)


def check_arrays(server: Any) -> None:
    """Make sure that arrays of Triton arrive as they were sent.

    Raises:
        CapabilityError: they do not.
    """
    import numpy
    import torch

    sent = torch.arange(1, 5)
    if server.Tensor.from_dlpack("x", sent).as_numpy().tolist() != sent.tolist():
        raise CapabilityError(
            f"this Triton reads NumPy {numpy.__version__} wrong: pip install 'numpy<2', or take a later Triton"
        )
