"""Opening a plan: refused with a reason where it is damaged or made for something else.

TensorRT's own refusal is a null pointer, and for a plan of another GPU it may come as late as the first call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.flavour import TENSORRT, Flavour
from qdeploy.engines.tensorrt.logger import create, last_errors, logger_of
from qdeploy.engines.tensorrt.profiles import Profile, parse_shapes
from qdeploy.engines.tensorrt.validity import check_validity
from qdeploy.engines.tensorrt.versions import numbers, version_of
from qdeploy.system.errors import CapabilityError, InvalidInputError
from qdeploy.system.gpu import Gpu
from qdeploy.system.hashing import sha256_file

ENGINE = "model.plan"
SIDECAR = "plan.json"
LAYERS = "layers.json"
REFIT = "weights"
# A version compatible plan carries code of its own, which runs with the user's rights.
TRUST = "QDEPLOY_TRUST_PLANS"


@dataclass
class Plan:
    """An opened plan. TensorRT's objects must go in the order in which they depend on each other.

    Attributes:
        sidecar: what the build wrote of it.
        runtime: TensorRT's runtime; it has to outlive the engine.
        engine: the engine.
        profiles: its optimization profiles.
    """

    sidecar: dict[str, Any]
    runtime: Any
    engine: Any
    profiles: list[Profile]

    def close(self) -> None:
        """Free it, the engine first."""
        self.engine = None
        self.runtime = None


def read_sidecar(folder: Path) -> dict[str, Any]:
    """What the build wrote of a plan, the plan's bytes checked against it.

    Raises:
        InvalidInputError: the plan is missing, truncated or not the one that was written.
    """
    try:
        sidecar: dict[str, Any] = json.loads((folder / SIDECAR).read_text())
        size, expected = (folder / ENGINE).stat().st_size, int(sidecar["plan_bytes"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(
            f"{folder} holds no plan with its {SIDECAR}: build the engine again"
        ) from error
    if size != expected:
        raise InvalidInputError(f"{folder / ENGINE} has {size} of {expected} bytes: copy or build it again")
    if sha256_file(folder / ENGINE) != sidecar["plan_sha256"]:
        raise InvalidInputError(f"{folder / ENGINE} is not the plan that was built: build the engine again")
    return sidecar


def check_origin(
    sidecar: Mapping[str, Any], version: tuple[int, ...], gpu: Gpu, flavour: Flavour = TENSORRT
) -> None:
    """Refuse a plan of another GPU or another TensorRT, unless it was built to travel.

    Raises:
        CapabilityError: it cannot run here.
    """
    made_by = sidecar.get("backend", TENSORRT.backend)
    if made_by != flavour.backend:
        raise CapabilityError(
            f"this plan was built by {made_by}, which {flavour.title} cannot load: open it with {made_by}"
        )
    options, origin = sidecar["options"], sidecar["gpu"]
    here = gpu.to_json()["capability"]
    if sidecar.get("targets"):
        if gpu.sm not in sidecar["targets"]:
            built_for = ", ".join(f"sm{sm}" for sm in sidecar["targets"])
            raise CapabilityError(
                f"this plan was built for {built_for}, the {gpu.name} is sm{gpu.sm}: build the engine with "
                f"--gpu sm{gpu.sm}"
            )
    elif origin["capability"] != here and not (options["hardware_compatible"] and gpu.sm >= 80):
        raise CapabilityError(
            f"this plan was built for compute capability {origin['capability']} ({origin['name']}), the "
            f"{gpu.name} has {here}: build the engine on this machine, or with --hardware-compatible"
        )
    built = numbers(sidecar["tensorrt"])
    if built != version and not (options["version_compatible"] and version >= built):
        otherwise = "" if flavour.targets else ", or with --version-compatible for later versions"
        raise CapabilityError(
            f"this plan was built by {flavour.title} {sidecar['tensorrt']}, here is "
            f"{'.'.join(map(str, version))}: build the engine again{otherwise}"
        )


def require_trust() -> None:
    """Make sure that the user lets version compatible plans run their code.

    Raises:
        CapabilityError: nobody said so.
    """
    if os.environ.get(TRUST) != "1":
        raise CapabilityError(
            f"a version compatible plan carries code that runs when it is loaded: set {TRUST}=1 if you trust "
            "who built it"
        )


def open_plan(trt: Any, folder: Path, gpu: Gpu, flavour: Flavour = TENSORRT) -> Plan:
    """Open the plan in a folder.

    Raises:
        InvalidInputError: it is damaged, or TensorRT refuses it.
        CapabilityError: it was made for another GPU or TensorRT, or brings code that nobody trusts.
    """
    sidecar = read_sidecar(folder)
    check_origin(sidecar, version_of(trt), gpu, flavour)
    options = sidecar["options"]
    logger = logger_of(trt)
    logger.messages.clear()
    runtime = create(trt.Runtime, logger, logger=logger)
    if options["version_compatible"]:
        require_trust()
        runtime.engine_host_code_allowed = True
    content = (folder / ENGINE).read_bytes()
    if flavour.targets:
        check_validity(trt, runtime, content, folder / ENGINE)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise InvalidInputError(f"TensorRT cannot load {folder / ENGINE}: {last_errors(logger)}")
    if options["strip_plan"]:
        _refit(trt, engine, folder / REFIT / "model.onnx", logger)
    if options["weight_streaming"]:
        # Before the first context exists; it may not be changed afterwards.
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    profiles = parse_shapes(sidecar["profiles"]) if sidecar["profiles"] else []
    return Plan(sidecar, runtime, engine, list(profiles))


def _refit(trt: Any, engine: Any, source: Path, logger: Any) -> None:
    """Give a plan without weights those of the graph that it was built from."""
    refitter = create(trt.Refitter, engine, logger, logger=logger)
    parser = create(trt.OnnxParserRefitter, refitter, logger, logger=logger)
    if not parser.refit_from_file(str(source.resolve())) or not refitter.refit_cuda_engine():
        raise InvalidInputError(f"TensorRT cannot take the weights of {source}: {last_errors(logger)}")
