"""`check` on a text-to-image pipeline: prompts, guidance, and metrics that know the prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qdeploy.calibration_set.collect import collect
from qdeploy.evaluate.check import check
from qdeploy.evaluate.quality import QualityPlan, Trajectories
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import CHECKING
from qdeploy.store.artifact import Artifact
from qdeploy.workflows.calibrate import calibrate
from tests.models import stable_diffusion_folder

PROMPTS = ["a red dog", "7 houses", "a cat"]


def test_prompts_and_guidance_reach_both_sides(tmp_path: Path) -> None:
    model = stable_diffusion_folder(tmp_path / "sd")
    data = collect(model, tmp_path / "set", keep=2, samples=3, steps=3, prompts=PROMPTS)
    checkpoint = calibrate(model, tmp_path / "c", recipe="w8a8-minmax", effort="fast", calibration=data)
    assert isinstance(checkpoint, Artifact)
    plan = {"samples": 4, "keep": 2, "steps": 3, "batch": 3}
    found = {
        guidance: check(
            checkpoint, reference=model, prompts=PROMPTS, guidance=guidance, min_sqnr=0, **plan
        ).quality
        for guidance in (1.0, 7.5)
    }
    assert found[1.0]["drift"] != found[7.5]["drift"]
    assert all(quality["ssim"]["count"] == quality["psnr"]["count"] == 4 for quality in found.values())
    trajectories = Trajectories(
        open_model(model),
        QualityPlan(replace(CHECKING, steps=3, batch=3, prompts=PROMPTS, guidance=7.5), samples=4, keep=2),
    )
    network = open_model(model).load()
    pairs = list(trajectories.pairs(network))
    assert [pair.prompts for pair in pairs] == [PROMPTS, PROMPTS[:1]]
    assert pairs[0].calls[0].expected.shape[0] == 2 * 3  # under guidance a prompt is two rows
    assert all(bool((pair.images == pair.expected_images).all()) for pair in pairs)
