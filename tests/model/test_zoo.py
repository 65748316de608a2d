"""The shipped models: in a clone, in a package of their own, or missing with one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.model import zoo
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import CapabilityError

CLONE = Path(zoo.__file__).parents[1] / "zoo"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As where the wheel is installed: no models beside the code; packages can be put into the folder."""
    zoo.zoo_folder.cache_clear()
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "qdeploy" / "model" / "zoo.py"))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    zoo.zoo_folder.cache_clear()


def test_models_are_found_in_a_package_of_their_own(installed: Path) -> None:
    shutil.copytree(CLONE / "digits", installed / "qdeploy_models" / "digits")
    assert zoo.zoo_models() == ["digits"]
    assert open_model("digits").path == installed / "qdeploy_models" / "digits"


def test_without_the_package_the_sentence_says_how_to_get_it(installed: Path) -> None:
    assert zoo.zoo_models() == []
    with pytest.raises(CapabilityError, match="qdeploy-models, which is not installed: `pip install"):
        open_model("digits")


def test_the_names_are_those_of_the_folders() -> None:
    assert tuple(zoo.zoo_models()) == zoo.NAMES


def test_prompts_come_from_shipped_models_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a stranger's prompt\n")
    assert zoo.with_shipped_prompts(Sampling(), tmp_path).prompts is None
    shipped = zoo.with_shipped_prompts(Sampling(), CLONE / "scenes")
    assert len(shipped.prompts or ()) == 16
    assert zoo.with_shipped_prompts(Sampling(prompts=["mine"]), CLONE / "scenes").prompts == ("mine",)
