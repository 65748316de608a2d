"""DGQ's groups as its code makes them for convolutions, along the im2col matrix: simulated (arXiv 2501.04304).

The code unfolds every convolution's input and groups, per layer, the dimension in which ranges differ more: rows
(input channel and kernel position) or columns (output pixels). No kernel forms that matrix; here it is computed
in torch, so that the paper's own numbers can be compared with those of what engines run. Departures, as in `dgq`:
dimension and groups are the same at every timestep, ranges include zero, no group is empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qdeploy.calibrate.groups import chosen_dimension, input_spreads, of_layer
from qdeploy.calibrate.input_groups import (
    activation_format,
    check_group_count,
    in_words,
    labels_along,
    quantized_inputs,
    set_group_scales,
)
from qdeploy.calibrate.session import Session
from qdeploy.model.folder import read_json
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import AXES, PIXELS, ROWS, SIMULATED
from qdeploy.recipe.stages import ACTIVATION_SCALES, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say
from qdeploy.system.suggest import unknown

ALONG = ("auto", ROWS, PIXELS)


@dataclass(frozen=True)
class GroupPatches(Stage):
    """Give rows or columns of convolutions' im2col matrices scales by groups.

    A scale of a pixel holds for the number of pixels that was calibrated: it locks the resolution. Layers that
    quantize the halves of a concatenation, and those whose channels or tokens have groups, are left as they are.
    Running it raises `UsageError` for an impossible number of groups, or where there are no activations to group.

    Attributes:
        groups: G, how many groups at most; 1 changes nothing.
        along: ``rows``, ``pixels``, or ``auto``: those whose ranges differ more, summed over timesteps.
    """

    name = "group-patches"
    description = (
        "scales for groups of rows or pixels of convolutions' im2col matrices, as DGQ's code; simulated"
    )
    paper = "DGQ, arXiv 2501.04304"
    needs = (ACTIVATION_SCALES,)
    gives = (ACTIVATION_SCALES,)

    groups: int = 8
    along: str = "auto"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an unknown dimension.
        """
        super().__post_init__()
        if self.along not in ALONG:
            raise UsageError(unknown("dimension of group-patches", self.along, ALONG))

    def run(self, session: Session) -> None:
        """Give convolutions quantizers along their patches."""
        activation_format(session, "group-patches")
        check_group_count(self.groups, {})
        families = {next(iter(readers)): list(readers.values()) for readers in quantized_inputs(session)}
        left = {path: reason for path, modules in families.items() if (reason := _unfit(modules))}
        free = {path: modules[0] for path, modules in families.items() if path not in left}
        measured = session.draft.step(
            f"{session.stage}-measured",
            lambda: input_spreads(session, free, session.weights_only, "patch ranges"),
        )
        plans: dict[str, tuple[str, Tensor]] = {}
        for path in free:
            found = of_layer(measured, path)
            dimension = chosen_dimension(found, (ROWS, PIXELS) if self.along == "auto" else (self.along,))
            if dimension is None:
                left[path] = "the number of pixels changes"
                continue
            labels = labels_along(session, found, dimension, self.groups)
            if int(labels.max()) == 0:
                left[path] = "one group"
            else:
                plans[path] = dimension, labels

        def compute() -> None:
            for path, (dimension, labels) in plans.items():
                quantizer = free[path].quantize_patches()
                set_group_scales(quantizer, of_layer(measured, path), dimension, labels, AXES[dimension])

        session.once("groups", compute)
        counts = _report(session, families, plans, left)
        say(f"groups of patches: {counts['simulated']} convolutions, simulated" + in_words(counts["left"]))

    def simulated(self) -> str:
        """Why no engine can run the result."""
        return "" if self.groups == 1 else SIMULATED


def _unfit(modules: list[QuantizedLayer]) -> str:
    """Why layers that read one tensor cannot have groups of patches; empty if they can."""
    inner = [module.inner for module in modules]
    if not all(isinstance(each, nn.Conv2d) for each in inner):
        return "no convolution"
    if len({_geometry(each) for each in inner}) > 1:
        return "read by convolutions of different kernels"
    if any(module.smoothing is not None or module.order is not None for module in modules):
        return "its channels have groups"
    if modules[0].split:
        return "quantizes the halves of a concatenation"
    if modules[0].activation_quantizers[0].axis is not None:
        return "has scales along an axis"
    return ""


def _geometry(inner: Any) -> tuple[Any, ...]:
    return inner.kernel_size, inner.stride, inner.padding, inner.dilation, inner.padding_mode


def _report(
    session: Session,
    families: Mapping[str, list[QuantizedLayer]],
    plans: Mapping[str, tuple[str, Tensor]],
    left: Mapping[str, str],
) -> dict[str, Any]:
    """Add ``patches`` to the report of groups, after the entries of groups of channels."""
    sizes = {path: len(modules) for path, modules in families.items()}
    along: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path, (dimension, _) in plans.items():
        along[dimension] += sizes[path]
    for path, reason in left.items():
        reasons[reason] += sizes[path]
    counts = {"simulated": sum(along.values()), "along": dict(along), "left": dict(reasons)}
    name = f"{session.component}/groups.json"
    file = session.draft.content / name
    layers = {
        path: {"along": dimension, "groups": int(labels.max()) + 1}
        for path, (dimension, labels) in plans.items()
    }
    known = read_json(file) if file.is_file() else {}
    session.draft.json(name, {**known, "patches": {"counts": counts, "layers": layers}})
    session.report["patch_groups"] = counts
    return counts
