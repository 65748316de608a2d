"""A pipeline whose packages are missing is refused by the name of what to install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.model import requirements
from qdeploy.model.folder import open_model
from qdeploy.system.errors import CapabilityError

WITHOUT_TRANSFORMERS = r"text_encoder of .* needs the package transformers: pip install 'qdeploy\[sd\]'"


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "is_installed", lambda package: package != "transformers")


@pytest.mark.usefixtures("no_transformers")
def test_text_to_image_names_the_extra_and_not_the_prompts(
    qdeploy: Callable[..., Result], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle on a white background")
    for words in (
        ["collect", "scenes", "-o", tmp_path / "set"],
        ["sample", "scenes", "-o", tmp_path / "images"],
    ):
        done = qdeploy(*words, "--prompts", prompts)
        assert done.exit_code == 4
        assert "pip install 'qdeploy[sd]'" in done.stderr


@pytest.mark.usefixtures("no_transformers")
def test_its_denoiser_alone_needs_no_text_encoder() -> None:
    model = open_model("scenes")
    assert model.build() is not None
    with pytest.raises(CapabilityError, match=WITHOUT_TRANSFORMERS):
        model.pipeline()


@pytest.mark.usefixtures("no_transformers")
def test_pipelines_without_text_are_not_affected() -> None:
    assert open_model("digits").pipeline() is not None
