"""The model of KServe's Python server: a packaged ``serve.py`` starts it from here.

KServe speaks the Open Inference Protocol, as Triton does, so that one client serves both.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

from qdeploy.sampling.requests import INPUTS, RESULT, ServedPipeline, read_requests
from qdeploy.system.errors import QDeployError


def serve(folder: str | Path, name: str) -> None:
    """Serve an engine until the process is ended; ports and the like are KServe's own options.

    Args:
        folder: of an engine that is a whole pipeline.
        name: of the model in requests.

    Raises:
        InvalidInputError: it is none, or damaged.
    """
    import kserve
    from kserve.errors import InvalidInput

    class Pipeline(kserve.Model):  # type: ignore[misc]
        """Images for prompts and seeds."""

        def load(self) -> bool:
            """Open the engine."""
            self.pipeline = ServedPipeline(folder)
            self.ready = True
            return True

        async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            """The images of a request, or HTTP 400 with what is wrong with it; other requests go on meanwhile."""
            if not isinstance(payload, kserve.InferRequest):
                raise InvalidInput(
                    "requests have the form of the Open Inference Protocol: /v2/models/.../infer"
                )
            return await asyncio.to_thread(self._answer, payload)

        def _answer(self, request: Any) -> Any:
            import torch

            try:
                columns = {each.name: each.as_numpy().flatten().tolist() for each in request.inputs}
                images = self.pipeline(read_requests(columns))
            except QDeployError as error:
                raise InvalidInput(str(error)) from error
            if wrong := next((image for image in images if isinstance(image, QDeployError)), None):
                raise InvalidInput(str(wrong))
            pixels = torch.stack([image for image in images if isinstance(image, torch.Tensor)]).numpy()
            output = kserve.InferOutput(name=RESULT, shape=list(pixels.shape), datatype="UINT8")
            output.set_data_from_numpy(pixels, binary_data=True)
            return kserve.InferResponse(
                response_id=request.id or uuid4().hex, model_name=name, infer_outputs=[output]
            )

        def get_input_types(self) -> list[dict[str, Any]]:
            """As the protocol describes models."""
            return [{"name": each, "datatype": kind, "shape": [-1, 1]} for each, kind in INPUTS.items()]

        def get_output_types(self) -> list[dict[str, Any]]:
            """As the protocol describes models."""
            return [{"name": RESULT, "datatype": "UINT8", "shape": [-1, -1, -1, -1]}]

    model = Pipeline(name)
    model.load()
    kserve.ModelServer().start([model])
