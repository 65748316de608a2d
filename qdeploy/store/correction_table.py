"""Mean errors of a quantized network's prediction by timestep: measured once, subtracted while sampling.

    COMPONENT/correction.safetensors   ``timesteps`` [T] ascending, and [T, C] mean errors of each channel of
                                       the prediction, under the name of the prediction's type

The fact ``correction`` of a checkpoint, of its bundle and of its engine holds the type and the file's hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.store.facts import CorrectionFacts
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_file

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.store.artifact import DenoiserArtifact


def prediction_type(scheduler: Mapping[str, Any]) -> str:
    """What a scheduler takes the network's output for, from its configuration.

    ``epsilon``, ``v_prediction``, ``sample``; or ``flow`` for those that say nothing and have no choice.
    """
    if "Flow" in str(scheduler.get("_class_name", "")):
        return "flow"
    return str(scheduler.get("prediction_type", "epsilon"))


@dataclass(frozen=True)
class CorrectionTable:
    """Mean errors of a prediction.

    Attributes:
        timesteps: [T] float32, ascending.
        means: [T, C], one for each channel of the prediction.
        prediction: the prediction's type.
    """

    timesteps: Tensor
    means: Tensor
    prediction: str

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CorrectionTable:
        """The table of the file's tensors.

        Raises:
            InvalidInputError: they are no table.
        """
        rest = [name for name in tensors if name != "timesteps"]
        if "timesteps" not in tensors or len(rest) != 1 or len(tensors[rest[0]]) != len(tensors["timesteps"]):
            raise InvalidInputError(
                "the correction table lacks timesteps, or has means for others than these"
            )
        return cls(tensors["timesteps"], tensors[rest[0]], rest[0])

    def to_tensors(self) -> dict[str, Tensor]:
        """The file's tensors."""
        return {"timesteps": self.timesteps, self.prediction: self.means}

    def nearest(self, timesteps: Tensor) -> Tensor:
        """[B, C] the means at the nearest timestep to each of [B]; of two, the lower."""
        distances = (timesteps.float().cpu()[:, None] - self.timesteps).abs()
        return self.means[distances.argmin(1)]


def correction_facts(file: Path) -> CorrectionFacts | None:
    """What an artifact says of its table; None if there is none."""
    from safetensors.torch import load_file

    if not file.is_file():
        return None
    table = CorrectionTable.from_tensors(load_file(file))
    return CorrectionFacts(prediction_type=table.prediction, sha256=sha256_file(file))


def read_correction(artifact: DenoiserArtifact) -> CorrectionTable:
    """The table of a checkpoint, a bundle or an engine.

    Raises:
        UsageError: it has none.
        InvalidInputError: the table is that of another checkpoint.
    """
    from safetensors.torch import load_file

    facts, file = artifact.facts.correction, artifact.correction
    if facts is None:
        raise UsageError(
            f"{artifact.path} has no correction table: calibrate with the stage measure-errors, or choose "
            "--correction none or online"
        )
    if file is None or sha256_file(file) != facts.sha256:
        raise InvalidInputError(
            f"the correction table in {artifact.path} was measured for another checkpoint: calibrate again, "
            "or choose --correction none"
        )
    return CorrectionTable.from_tensors(load_file(file))


def check_prediction(table: CorrectionTable, scheduler: Any, where: str) -> None:
    """Refuse a scheduler that takes predictions for something else than the table does.

    Raises:
        InvalidInputError: it does.
    """
    kind = prediction_type({**scheduler.config, "_class_name": type(scheduler).__name__})
    if kind != table.prediction:
        raise InvalidInputError(
            f"the correction table of {where} was measured for predictions of type {table.prediction}, and "
            f"{type(scheduler).__name__} takes them for {kind}: choose --correction none"
        )
