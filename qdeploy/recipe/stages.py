"""Stages and methods: what a calibration consists of.

A stage is a dataclass: its fields are its options, and ``run`` does the work. A method is a list of stages. The
file of a paper defines a `Method` and the stages that the paper brought; packages register such files as
entry points (`qdeploy.system.plugins`), and this one's are in ``calibrate/methods/``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import isabstract
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

from qdeploy.recipe.effort import Effort
from qdeploy.system.errors import UsageError
from qdeploy.system.plugins import METHODS, named
from qdeploy.system.suggest import did_you_mean, unknown

if TYPE_CHECKING:
    from qdeploy.calibrate.session import Session

# What stages leave behind for others.
WEIGHT_SCALES, ROUNDINGS, ACTIVATION_SCALES = "weight scales", "roundings", "activation scales"
ROTATIONS, BRANCHES = "rotations", "low-rank branches"
SCALES = (WEIGHT_SCALES, ROUNDINGS, ACTIVATION_SCALES)
RESULTS = (*SCALES, ROTATIONS, BRANCHES)

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    type(None): "none",
}


@dataclass(frozen=True)
class Stage(ABC):
    """One step of a method. Subclasses are dataclasses; their fields are the stage's options.

    Every option has a default. One whose default is None is decided elsewhere, by the effort for instance;
    it appears in a recipe's JSON only where it is set.

    Attributes:
        name: the word that recipes use.
        description: one line for people.
        paper: where it comes from, if not from the method's own paper.
        needs: what earlier stages must have produced: some of `RESULTS`.
        gives: what it produces.
        spoils: what must not exist yet, since this stage changes what it was made from.
        uniform: whether it needs integer codes, as learned rounding does: up or down by one equal step.
        last: whether nothing may come after it, since it measures the result.
        rows: whether it looks at calibration rows; a recipe none of whose stages does needs no calibration set.
    """

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    spoils: ClassVar[tuple[str, ...]] = ()
    uniform: ClassVar[bool] = False
    last: ClassVar[bool] = False
    rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options of a wrong type; subclasses that refuse more call this first.

        Raises:
            UsageError: an option's value is not of the type of its default.
        """
        hints = get_type_hints(type(self))
        for option in fields(self):
            value, kinds = getattr(self, option.name), get_args(hints[option.name]) or (hints[option.name],)
            if not any(_is(value, kind) for kind in kinds):
                wanted = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
                raise UsageError(f"the option {option.name} of {self.name} is {wanted}, not {value!r}")

    @abstractmethod
    def run(self, session: Session) -> None:
        """Change the quantizers of the session's network.

        Every unit of work is done through ``session.once``, which makes it resumable.
        """

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """What the estimate of a calibration comes from.

        Args:
            units: reconstruction units of the network.
            effort: of the recipe.

        Returns:
            How often the stage runs the denoiser over all rows, and how many training steps it makes per unit.
        """
        return 1, 0

    def operations(self, session: Session) -> float:
        """Multiply-accumulate operations on matrices besides, for the estimate."""
        return 0

    def memory(self, session: Session) -> float:
        """Bytes that it takes besides the network and what is recorded, for the estimate."""
        return 0

    def simulated(self) -> str:
        """Why no engine can run the result; empty if one can."""
        return ""

    @property
    def options(self) -> dict[str, Any]:
        """The options with their values, without those that are decided elsewhere."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The options with their defaults."""
        return {option.name: option.default for option in fields(cls)}


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


@dataclass(frozen=True)
class ForeignStage(Stage):
    """A stage of an artifact's recipe that no installed package knows; it cannot run.

    Attributes:
        word: its name.
        values: its options.
    """

    word: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.word)

    @property
    def options(self) -> dict[str, Any]:
        """The options as they were read."""
        return dict(self.values)

    def run(self, session: Session) -> None:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"no installed package has a stage {self.word!r}")


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: the word that recipes use.
        paper: where it was published.
        description: one line for people.
        stages: what it consists of.
        coverage: the profile that it is meant for, where a recipe names none.
    """

    name: str
    paper: str
    description: str
    stages: Sequence[Stage]
    coverage: str = "portable"


def methods() -> dict[str, Method]:
    """All methods by name.

    Raises:
        CapabilityError: a package registers one that cannot be imported.
    """
    return named(METHODS, lambda value: isinstance(value, Method), "method")


def stages() -> dict[str, type[Stage]]:
    """All stages by name.

    Raises:
        CapabilityError: a package registers one that cannot be imported.
    """
    return named(METHODS, _is_stage, "stage")


def _is_stage(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Stage) and not isabstract(value) and bool(value.name)


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in methods():
        raise UsageError(unknown("method", name, methods()))
    return methods()[name]


def make_stage(name: str, options: Mapping[str, Any]) -> Stage:
    """The stage of that name.

    Raises:
        UsageError: there is none, or it has no such option.
    """
    if name not in stages():
        raise UsageError(unknown("stage", name, stages()))
    kind = stages()[name]
    if foreign := sorted(map(str, options.keys() - kind.defaults().keys())):
        known = list(kind.defaults())
        near = did_you_mean(foreign[0], known)
        raise UsageError(
            f"stage {name!r} has no option {foreign[0]!r}{near}: it has {', '.join(known) or 'none'}"
        )
    return kind(**{name: _number(kind.defaults()[name], value) for name, value in options.items()})


def _number(default: Any, value: Any) -> Any:
    """The value of an option; ``1e-3`` is a word in YAML 1.1, and a number here where one is needed."""
    if isinstance(default, float) and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def parse_stage(entry: Any) -> Stage:
    """A stage from Python or YAML: a stage, its name, or its name with options.

    Raises:
        UsageError: it is of another type, or names an unknown stage or option.
    """
    if isinstance(entry, Stage):
        return entry
    if isinstance(entry, str):
        return make_stage(entry, {})
    pair = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else entry
    if isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1] or {}, Mapping):
        return make_stage(str(pair[0]), pair[1] or {})
    raise UsageError(f"a stage is a name, or a name with a mapping of options, not {entry!r}")


def check_stages(listed: Iterable[Any]) -> tuple[Stage, ...]:
    """The stages of a list, in an order that is possible.

    Args:
        listed: stages, or what `parse_stage` makes into stages.

    Raises:
        UsageError: a stage or an option is unknown, or the order is impossible.
    """
    checked: list[Stage] = []
    there: set[str] = set()
    for stage in map(parse_stage, listed):
        if checked and checked[-1].last:
            raise UsageError(f"stage {checked[-1].name!r} measures the result: list it after {stage.name!r}")
        if lacking := [result for result in stage.needs if result not in there]:
            able = [other.name for other in stages().values() if lacking[0] in other.gives]
            raise UsageError(
                f"stage {stage.name!r} needs {lacking[0]}: list one of {', '.join(able)} before it"
            )
        if spoiled := [result for result in stage.spoils if result in there]:
            raise UsageError(
                f"stage {stage.name!r} changes what {spoiled[0]} were found for: list it before the stages that "
                "find them"
            )
        there |= set(stage.gives)
        checked.append(stage)
    return tuple(checked)
