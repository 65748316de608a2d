"""Models in other layouts than diffusers' folders: single files, checkpoints of latent diffusion, LoRA."""
