"""Small trained models for the demo and the tests: in a clone, or in the package ``qdeploy-models``."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import CapabilityError
from qdeploy.system.progress import say

NAMES = ("digits", "digits-dit", "scenes")
_PACKAGE = "qdeploy_models"
_PROMPTS = "prompts.txt"


@cache
def zoo_folder() -> Path | None:
    """Where the models are: in a clone next to the code, else in the package ``qdeploy-models``; None if nowhere."""
    here = Path(__file__).parents[1] / "zoo"
    if any(here.glob("*/model_index.json")):
        return here
    package = find_spec(_PACKAGE)
    places = package.submodule_search_locations if package else None
    return Path(next(iter(places))) if places else None


def zoo_models() -> list[str]:
    """Names of the models that are installed."""
    folder = zoo_folder()
    return [] if folder is None else sorted(index.parent.name for index in folder.glob("*/model_index.json"))


def find_zoo_model(name: str) -> Path | None:
    """Folder of the model of that name, if there is one.

    Raises:
        CapabilityError: there would be, but the package of models is not installed.
    """
    folder = zoo_folder()
    if folder is not None and name in zoo_models():
        return folder / name
    if folder is None and name in NAMES:
        raise CapabilityError(
            f"the model {name} is in the package qdeploy-models, which is not installed: "
            "`pip install ./tools/models_package` in a clone of qdeploy"
        )
    return None


def with_shipped_prompts(sampling: Sampling, model: Path) -> Sampling:
    """The same; where no prompts are given, with those that a shipped model has.

    Args:
        sampling: how images are sampled.
        model: the model's folder. Prompts are taken from models of the package alone.
    """
    file = model / _PROMPTS
    if sampling.prompts is not None or model.parent != zoo_folder() or not file.is_file():
        return sampling
    prompts = file.read_text(encoding="utf-8").splitlines()
    say(f"no prompts are given: {model.name} is sampled with the {len(prompts)} that it comes with")
    return replace(sampling, prompts=prompts)
