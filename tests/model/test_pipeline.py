"""Any stock pipeline is called in one way."""

from __future__ import annotations

import pytest

from qdeploy.model.pipeline import generate
from qdeploy.system.errors import CapabilityError


def test_a_package_that_a_pipeline_needs_is_named() -> None:
    """Pipelines of diffusers import some packages where they are installed, and then use them all the same."""

    class Cleaning:
        def __call__(self, num_inference_steps: int, generator: object) -> object:
            return missing_package.fix_text("a cat")  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(CapabilityError, match="Cleaning needs the package missing_package: pip install"):
        generate(Cleaning(), [0], 2)
