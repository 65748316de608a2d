"""Tiny diffusers networks and pipelines with random weights: the only place of the tests that defines them."""

from tests.models.networks import FAMILIES, make, tiny_dit
from tests.models.pipelines import (
    LETTERS,
    PROMPT_LENGTH,
    TEXT_WIDTH,
    ddpm_folder,
    dit_folder,
    stable_diffusion_folder,
)
from tests.models.transformers import flux_folder, pixart_folder, sd3_folder, sdxl_folder

__all__ = [
    "FAMILIES",
    "LETTERS",
    "PROMPT_LENGTH",
    "TEXT_WIDTH",
    "ddpm_folder",
    "dit_folder",
    "flux_folder",
    "make",
    "pixart_folder",
    "sd3_folder",
    "sdxl_folder",
    "stable_diffusion_folder",
    "tiny_dit",
]
