"""The scope of a lint run: what a graph has to run on."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdeploy.export.graph.shapes import Shape


@dataclass(frozen=True)
class Scope:
    """What a graph is meant to run on.

    Attributes:
        target: a name from `qdeploy.recipe.targets`: the rules of its backends apply.
        engine: ``tensorrt`` or ``tensorrt-rtx``: whose verdicts the rules of TensorRT get.
        tensorrt: TensorRT's version, major and minor.
        compute_capability: the GPU's, as ``(8, 9)``; without it no rule asks for it.
        profile: smallest, optimal and largest shape of inputs, by name.
    """

    target: str = "tensorrt"
    engine: str = "tensorrt"
    tensorrt: tuple[int, int] = (11, 4)
    compute_capability: tuple[int, int] | None = None
    profile: dict[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)

    @property
    def optimal(self) -> dict[str, Shape]:
        """The optimal shape of each input that the profile names."""
        return {name: shape for name, (_, shape, _) in self.profile.items()}
