"""The parts of a comparison: what each metric needs of a batch of pairs, and nothing else of it.

A part is made wherever there is room; images and trajectories stay there. Metrics merge parts in their order, so that
what is measured is the same, bit for bit, however many processes there were and however often they were stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor, nn

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import MergingMeter, Meter, code_of_metrics, metrics, other_metrics
from qdeploy.evaluate.paired_sample import Pair, read_pair, tensors_of
from qdeploy.parts.folder import PartFolder
from qdeploy.parts.plan import Job
from qdeploy.store.files import save_tensors
from qdeploy.store.paths import cache_folder
from qdeploy.system.devices import kind_of
from qdeploy.system.errors import CapabilityError
from qdeploy.system.hashing import sha256_of
from qdeploy.system.progress import say
from qdeploy.version import __version__

if TYPE_CHECKING:
    from qdeploy.evaluate.quality import Trajectories

OBSERVED = "observed.safetensors"
_PAIR = "pair"  # before the names of a whole pair's tensors


def meters_of(context: MetricContext) -> dict[str, Meter]:
    """A measurement for each metric whose resources are there, by name."""
    found = {name: metric.meter(context) for name, metric in metrics().items()}
    return {name: meter for name, meter in found.items() if meter is not None}


def results_of(meters: Mapping[str, Meter]) -> dict[str, Any]:
    """What was measured, by name.

    Raises:
        CapabilityError: a metric of another package gives what JSON has no word for.
    """
    values = {name: meter.result() for name, meter in meters.items()}
    for name, package in other_metrics().items():
        try:
            json.dumps(values.get(name), allow_nan=False)
        except ValueError:
            say(
                f"the metric {name!r} of {package} gives {values[name]!r}, which JSON cannot hold: it is left out"
            )
            del values[name]
        except TypeError as error:
            value = values[name]
            raise CapabilityError(
                f"the metric {name!r} of {package} gives {value!r} of type {type(value).__name__}: its result is to "
                "be a number or a text of Python, or a list or dict of those; None leaves it out"
            ) from error
    return {name: value for name, value in values.items() if value is not None}


class QualityParts:
    """One comparison of a subject with the reference.

    Args:
        pair: a batch of reference and subject, by its number.
        count: how many batches there are.
        identity: what determines the pairs, in JSON's types.
        context: what metrics may use.
        arguments: of `qdeploy.evaluate.check.check`; None where other processes cannot open them.
        output: what is compared, in messages.
        device: torch device.
    """

    def __init__(
        self,
        pair: Callable[[int], Pair],
        count: int,
        identity: list[Any],
        context: MetricContext,
        arguments: Mapping[str, Any] | None = None,
        output: str | Path = "the comparison",
        device: str = "cpu",
    ) -> None:
        self._pair, self._context = pair, context
        code = code_of_metrics()
        request = sha256_of(
            [__version__, identity, context.identity, sorted(self.meters), *([code] if code else [])]
        )
        place = cache_folder() / "evaluations" / request[:32]
        self.job = Job(
            "check", place, request, count, output, arguments, self.make, device, "sampling in pairs"
        )

    @cached_property
    def meters(self) -> dict[str, Meter]:
        """The measurements."""
        return meters_of(self._context)

    def make(self, number: int, folder: Path) -> None:
        """What metrics need of one batch."""
        pair = self._pair(number)
        observed: dict[str, Tensor] = {}
        for name, meter in self.meters.items():
            if isinstance(meter, MergingMeter):
                observed |= {f"{name}.{part}": value for part, value in meter.observe(pair).items()}
            else:
                observed |= {f"{_PAIR}.{part}": value for part, value in tensors_of(pair).items()}
        save_tensors(_named_once(observed), folder / OBSERVED)

    def measure(self, parts: PartFolder) -> dict[str, Any]:
        """The metrics' values, from all parts."""
        for files in parts.each(self.make):
            observed = dict(_each_name(load_file(files[OBSERVED])))
            pair = read_pair(_below(observed, _PAIR)) if f"{_PAIR}.images" in observed else None
            for name, meter in self.meters.items():
                if isinstance(meter, MergingMeter):
                    meter.merge(_below(observed, name))
                else:
                    assert pair is not None
                    meter.add(pair)
        return results_of(self.meters)


def quality_parts(
    trajectories: Trajectories,
    subject: nn.Module,
    context: MetricContext,
    key: str,
    arguments: Mapping[str, Any] | None = None,
    output: str | Path = "the comparison",
) -> QualityParts:
    """The comparison of a subject with the reference in parts.

    Args:
        trajectories: of the reference.
        subject: a denoiser, or an object with the same interface.
        context: what metrics may use.
        key: names the subject, and how it is run.
        arguments: of `qdeploy.evaluate.check.check`; None where other processes cannot open them.
        output: what is compared, in messages.
    """
    kind = kind_of(trajectories.device)
    key = key if kind == "cpu" else f"{key} {kind}"
    plan = trajectories.plan
    described = {**asdict(plan), "sampling": plan.sampling.to_json()}
    identity = [key, trajectories.model.sha256, trajectories.rest, described]
    pair = partial(trajectories.pair, subject)
    return QualityParts(pair, len(plan.batches()), identity, context, arguments, output, trajectories.device)


def _named_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under all its names: several metrics use the same features."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    # Tensors that share memory, or are parts of larger ones, cannot be stored as they are.
    return {"|".join(each): tensors[each[0]].detach().cpu().clone() for each in names.values()}


def _each_name(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for names, tensor in tensors.items() for name in names.split("|"))


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {each.removeprefix(start): tensor for each, tensor in tensors.items() if each.startswith(start)}
