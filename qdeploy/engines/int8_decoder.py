"""An autoencoder's decoder at W8A8: ``--components vae=w8a8``.

ONNX Runtime's static quantization, with ranges from latents of the calibration set. Layers whose rounding costs
most stay in float, as few as reach `FLOOR_DB`. Weights have seven bits, so that no processor's sums overflow; what
transposed convolutions read is signed, since OpenVINO's kernels of those know no zero point.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.store.bounded_json import read_json_object
from qdeploy.system.errors import CheckFailed, InvalidInputError
from qdeploy.system.progress import say, track

W8A8 = "w8a8"
FLOOR_DB = 40.0
_LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_LEAST_IMAGES, _MOST_IMAGES = 2, 16
_SIDE = 16  # rows and columns of latents to rank layers on: decoders take any size


@dataclass(frozen=True)
class QuantizedDecoder:
    """What became of a decoder.

    Attributes:
        psnr_db: PSNR of images decoded from held-out latents to those of the decoder in float.
        layers: convolutions and products of matrices.
        floats: those of them that stay in float, by node.
        images: images whose latents were held out.
    """

    psnr_db: float
    layers: int
    floats: tuple[str, ...]
    images: int

    def to_json(self) -> dict[str, Any]:
        """As the engine's folder holds it."""
        return {**asdict(self), "floats": list(self.floats)}


def latents_of(calibration: CalibrationSet, folder: Path) -> np.ndarray:
    """What a decoder is given at the end of each trajectory of a set, nearly: the sample of the last call.

    Args:
        calibration: the set.
        folder: of the decoder's graph, with its configuration.

    Returns:
        ``[images, C, H, W]``, in the decoder's scale.

    Raises:
        InvalidInputError: the set's samples are no latents of this decoder, or of too few images.
    """
    config = read_json_object(folder / "config.json")
    path, channels = calibration.artifact.path, config.get("latent_channels")
    late = -calibration.timesteps.double().reshape(-1)
    rows = [
        int(torch.where(calibration.images == image, late, -torch.inf).argmax())
        for image in calibration.images.unique()[:_MOST_IMAGES]
    ]
    if len(rows) < _LEAST_IMAGES:
        raise InvalidInputError(f"{path} holds one image: ranges of a decoder need two, one of them to check")
    x = calibration.inputs(rows)[calibration.sample].float()
    if x.ndim != 4 or x.shape[1] != channels or config.get("latents_mean") is not None:
        raise InvalidInputError(
            f"the samples of {path}, {list(x.shape[1:])}, are no plain latents of {folder.name}: build it with "
            "16 bits or f32"
        )
    x = x / float(config.get("scaling_factor") or 1) + float(config.get("shift_factor") or 0)
    return np.ascontiguousarray(x.numpy())


def quantize_decoder(graph: Path, latents: np.ndarray, output: Path) -> QuantizedDecoder:
    """Write the quantized graph of a decoder, as few of whose layers stay in float as its images allow.

    Args:
        graph: in float.
        latents: of at least two images; the second half is held out.
        output: the file to write.

    Raises:
        CheckFailed: even with most layers in float, images are further from float than `FLOOR_DB`.
    """
    half = len(latents) // 2
    known, unseen = latents[:half], latents[half:]
    work = _Work(graph, known, output)
    exact = work.images(graph, unseen)
    order, least = work.sensitive_first(known[:2, :, :_SIDE, :_SIDE]), 0.0
    count = 0
    while count <= len(order) // 2:
        floats = order[:count]
        work.write([name for name in order if name not in floats], output)
        least = psnr(work.images(output, unseen), exact)
        say(f"{graph.parent.name} at W8A8 with {count} of {len(order)} layers in float: PSNR {least:.1f} dB")
        if least >= FLOOR_DB:
            return QuantizedDecoder(round(least, 2), len(order), tuple(sorted(floats)), len(unseen))
        count = max(count + 1, count * 3 // 2)
    raise CheckFailed(
        f"{graph.parent.name} at W8A8 has a PSNR of {least:.1f} dB to float with half of its layers in float, "
        f"below {FLOOR_DB:.0f}: build it with 16 bits or f32"
    )


def psnr(images: np.ndarray, exact: np.ndarray) -> float:
    """PSNR in dB of decoded images in [-1, 1], clipped as pipelines do it."""
    error = np.square(images.clip(-1, 1).astype(float) - exact.clip(-1, 1)).mean() / 4
    return float(-10 * np.log10(max(error, 1e-12)))


class _Work:
    """A decoder, its ranges, and ways to quantize some of its layers."""

    def __init__(self, graph: Path, known: np.ndarray, output: Path) -> None:
        import onnx
        from onnxruntime.quantization.calibrate import create_calibrator

        output.parent.mkdir(parents=True, exist_ok=True)
        self.graph, self.scratch = graph, output.with_name("some-layers.onnx")
        model = onnx.load(graph)
        self.nodes = [node.name for node in model.graph.node if node.op_type in _LAYERS]
        self.signed = {node.input[0] for node in model.graph.node if node.op_type == "ConvTranspose"}
        self.input: str = model.graph.input[0].name
        with _quiet():
            calibrator = create_calibrator(
                graph, list(_LAYERS), augmented_model_path=str(output.with_name("ranges.onnx"))
            )
            calibrator.collect_data(iter_reader({self.input: x[None]} for x in known))
            self.ranges = calibrator.compute_data()

    def write(self, layers: Sequence[str], output: Path) -> None:
        """The graph with these layers quantized."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        signed = {"quant_type": QuantType.QInt8, "symmetric": True}
        with _quiet():
            quantizer = QDQQuantizer(
                onnx.load(self.graph),
                per_channel=True,
                reduce_range=True,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=list(layers),
                nodes_to_exclude=[],
                op_types_to_quantize=list(_LAYERS),
                extra_options={
                    "ActivationSymmetric": False,
                    "WeightSymmetric": True,
                    "TensorQuantOverrides": {name: [dict(signed)] for name in self.signed},
                },
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(str(output))

    def sensitive_first(self, latents: np.ndarray) -> list[str]:
        """All layers, the one whose rounding alone changes images most first."""
        exact, error = self.images(self.graph, latents), {}
        for name in track(self.nodes, "layers of the decoder"):
            self.write([name], self.scratch)
            error[name] = -psnr(self.images(self.scratch, latents), exact)
        self.scratch.unlink(missing_ok=True)
        return sorted(self.nodes, key=lambda name: -error[name])

    def images(self, graph: Path, latents: np.ndarray) -> np.ndarray:
        """What a graph decodes, one after the other."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {self.input: x[None]})[0] for x in latents])


def iter_reader(feeds: Iterator[dict[str, np.ndarray]]) -> Any:
    """Feeds as ONNX Runtime's calibration takes them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer logs advice on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
