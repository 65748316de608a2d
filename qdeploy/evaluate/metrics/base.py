"""What a metric is, and the registry of metrics.

A metric sees one `Pair` after the other, so that only its own sums are kept. What it takes from a pair is computed
where the pair was made, and merged in the order of pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.model.folder import Model
from qdeploy.system.plugins import METRICS, code_of, named, objects


class Meter(Protocol):
    """A measurement in progress."""

    def add(self, pair: Pair) -> None:
        """Take a batch into account."""

    def result(self) -> Any:
        """The measured value, in JSON's types."""


class MergingMeter(ABC):
    """A `Meter` in two halves: what of a pair it needs, and taking that into account.

    The first half may run in another process, and only its tensors are kept. A meter without the halves works too;
    then whole pairs are kept for it.
    """

    @abstractmethod
    def observe(self, pair: Pair) -> dict[str, Tensor]:
        """What the measurement needs of a batch, by name; depends on the batch alone."""

    @abstractmethod
    def merge(self, observed: Mapping[str, Tensor]) -> None:
        """Take what `observe` found into account; called in the order of batches."""

    def add(self, pair: Pair) -> None:
        """Take a batch into account."""
        self.merge(self.observe(pair))


@dataclass(frozen=True)
class Metric:
    """A way to measure quality.

    Attributes:
        name: the value's name in reports; ends with its unit, where it has one.
        description: one line for people.
        start: begins a measurement for a reference model; returns None where the model lacks what it needs.
        begin: the same for metrics that need more than the reference model; takes precedence over `start`.
    """

    name: str
    description: str
    start: Callable[[Model], Meter | None] = lambda model: None
    begin: Callable[[MetricContext], Meter | None] | None = None

    def meter(self, context: MetricContext) -> Meter | None:
        """A measurement with the available resources; None where one is missing."""
        return self.start(context.model) if self.begin is None else self.begin(context)


def metrics() -> dict[str, Metric]:
    """All metrics by name: this package's in alphabetical order of their modules, then those of other packages.

    Raises:
        CapabilityError: a package registers one that cannot be imported.
    """
    return named(METRICS, lambda value: isinstance(value, Metric), "metric")


def other_metrics() -> dict[str, str]:
    """The packages that register metrics, this one excepted, by the metric's name."""
    found = objects(METRICS, lambda value: isinstance(value, Metric))
    return {each.value.name: each.package for each in found if each.package != "qdeploy"}


def code_of_metrics() -> dict[str, str]:
    """The code of the metrics of other packages (see `qdeploy.system.plugins.code_of`)."""
    return code_of(metric.begin or metric.start for metric in metrics().values())
