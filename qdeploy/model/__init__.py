"""Models as diffusers stores them: folders, pipelines, inputs, prompts, schedulers."""
