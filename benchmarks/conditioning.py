"""How a zoo model is sampled in a benchmark: prompts to calibrate with, others to judge with, guidance, steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qdeploy.evaluate.attribute_network import FOLDER
from qdeploy.evaluate.quality import QualityPlan
from qdeploy.model.folder import Model
from qdeploy.model.sampling import CHECKING
from tools.zoo.judge_scenes import GUIDANCE, STEPS, held_out_prompts, seen_prompts

CALIBRATION_IMAGES = 64
BATCH = 32
# Of models without prompts.
UNCONDITIONAL_STEPS = 50


@dataclass(frozen=True)
class Conditioning:
    """How one model is sampled.

    Attributes:
        scenes: whether it takes captions of scenes, and pictures are read back by its attribute network.
        steps: of DDIM.
        guidance: classifier-free guidance scale; None for the pipeline's own.
    """

    scenes: bool
    steps: int
    guidance: float | None

    @classmethod
    def of(cls, model: Model) -> Conditioning:
        """What a model is sampled with: by prompts of scenes if it comes with a network that reads scenes."""
        scenes = (model.path / FOLDER).is_dir()
        return cls(scenes, STEPS if scenes else UNCONDITIONAL_STEPS, GUIDANCE if scenes else None)

    def collection(self, seed: int) -> dict[str, Any]:
        """Arguments of `collect`: prompts are of scenes that are not held out."""
        return {
            "samples": CALIBRATION_IMAGES,
            "steps": self.steps,
            "scheduler": "ddim",
            "guidance": self.guidance,
            "prompts": seen_prompts(CALIBRATION_IMAGES, seed) if self.scenes else None,
            "seed": 1000 * seed,
            "batch": BATCH,
        }

    def plan(self, samples: int) -> QualityPlan:
        """What is sampled to judge: a held-out prompt for each image."""
        prompts = held_out_prompts(samples, CHECKING.seed) if self.scenes else None
        how = replace(CHECKING, steps=self.steps, batch=BATCH, guidance=self.guidance, prompts=prompts)
        return QualityPlan(how, samples)

    def __str__(self) -> str:
        told = f"DDIM {self.steps} steps"
        return f"{told}, guidance {self.guidance:g}, held-out prompts" if self.scenes else told
