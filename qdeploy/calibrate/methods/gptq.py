"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): roundings in closed form, layer by layer, without training.

The mean squared error of what a layer computes is a quadratic form of its weight, given by the second moments of its
inputs (section 3.2); algorithm 1 rounds one column after the other and lets the others make up for it. Layers come in
the order of execution, so that each sees inputs from layers that are done.

Departures from the paper, each for a reason:

- convolutions too, as products of their windows (im2col), in groups or not;
- moments are of vectors drawn from all rows, a fixed number for each input of the layer: from all pixels, a
  convolution's Hessian would cost K / O times the convolution itself;
- ranges stay as they were found, per channel, block or part, so columns may come in any order: the largest second
  moment first, as in the authors' code (``act_order`` with static groups);
- a channel that would be worse than rounded to nearest stays so;
- as an option, the aim is what the layer computes from full-precision inputs, not from those that it will get (the
  objective of GPTAQ, Li et al., ICML 2025, arXiv 2504.02692): the least squares solution for the inputs that it will
  get takes the weight's place, and is rounded as before.

Coordinate descent on the codes afterwards (QuantEase, Behdin et al. 2023, arXiv 2309.01885) was tried and left out:
it lowers the error of each layer, and not that of the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.quadratic import Grid, made_up_for, quadratic_error, round_rows
from qdeploy.calibrate.record_units import UnitRun
from qdeploy.calibrate.rounding import undecided
from qdeploy.calibrate.second_moments import BLOCK, Moments, columns_of, read_vectors
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.network.roles import Layer
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import full_precision
from qdeploy.quant.operators import code_type, over_weight
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ROUNDINGS, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say, track

MATRICES = 6  # as large as the moments of a layer, at once
READS = 3  # about how often a unit runs, each time up to one of its layers


@dataclass(frozen=True)
class GPTQ(Stage):
    """Round every weight by the second moments of what its layer reads.

    Weights whose rounding an earlier stage has decided stay as they are.

    Attributes:
        damping: share of the mean of the Hessian's diagonal that is added to it.
        samples: vectors that moments are taken of, for each input of the layer.
        max_rows: calibration rows that they come from, at most.
        bias: let the bias take over the mean of the error (Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2).
        full_inputs: aim at what the layer computes from full-precision inputs, so that later layers make up for the
            errors of earlier ones.
    """

    name = "gptq"
    description = "roundings in closed form, from the second moments of layers' inputs"
    needs = (WEIGHT_SCALES,)
    gives = (ROUNDINGS,)

    damping: float = 0.01
    samples: int = 32
    max_rows: int = 128
    bias: bool = False
    full_inputs: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: a number is impossible.
        """
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise UsageError(f"the damping of gptq must be between 0 and 1, not {self.damping}")
        for option, value in (("samples", self.samples), ("max_rows", self.max_rows)):
            if value < 1:
                raise UsageError(f"the {option} of gptq must be at least 1, not {value}")

    def run(self, session: Session) -> None:
        """Decide the codes of all weights."""
        walk, modes = (
            UnitWalk(session, rows=self.max_rows),
            ("student", "teacher") if self.full_inputs else ("student",),
        )
        for number, (unit, layers) in enumerate(track(list(session.units.items()), "gptq")):

            def compute(unit: str = unit, layers: list[Layer] = layers) -> None:
                if not undecided(session.quantized(layers)):
                    return
                with session.weights_only(), torch.no_grad():
                    runs = [walk.run(unit, mode) for mode in modes]
                    for readers in _in_order(layers):
                        self._round(session, walk.rows, runs, readers)

            session.once(f"{number:04d}", compute, prefix=unit)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        share = min(1.0, self.max_rows / effort.rows)
        return share * (1 + READS) * (2 if self.full_inputs else 1), 0

    def operations(self, session: Session) -> float:
        """See `Stage.operations`: of moments, factors, rounding and its judgement in double precision."""
        found, rows = 0.0, len(session.rows(self.max_rows))
        for layer, module in zip(session.layers, session.quantized(session.layers), strict=True):
            groups, columns = columns_of(module)
            outputs = len(module.weight) / groups
            vectors = min(self.samples * columns, rows * layer.macs / module.weight.numel())
            half = min(columns, (columns + BLOCK) / 2)  # of the moments, which are symmetric
            compared = min(columns, 2 * outputs) if self.full_inputs else 0
            moments = vectors * columns * (half + compared)
            found += groups * (moments + 2 / 3 * columns**3 + 5 * outputs * columns**2)
        return found

    def memory(self, session: Session) -> float:
        """See `Stage.memory`: the moments of the largest layer, and what is made of them."""
        return (
            MATRICES * 4 * max((columns_of(m)[1] ** 2 for m in session.quantized(session.layers)), default=0)
        )

    def _round(
        self, session: Session, rows: Sequence[int], runs: Sequence[UnitRun], readers: Sequence[Layer]
    ) -> None:
        """Round the layers that read one tensor; ``runs`` of the unit with its inputs, and in full precision."""
        pairs = zip(readers, session.quantized(readers), strict=True)
        modules = {layer.path: module for layer, module in pairs if undecided([module])}
        if not modules:
            return
        moments = {path: Moments(module, self.full_inputs) for path, module in modules.items()}
        batches = torch.arange(len(rows)).split(session.batch)
        generators = {path: session.generator("gptq", path) for path in modules}

        def vectors(run: UnitRun, rows: Tensor) -> dict[str, Tensor]:
            """What the layers read, by their paths; the same places of the tensors in every run."""
            seen: dict[str, Tensor] = {}

            def before(call: ModuleCall) -> None:
                layer = modules[call.name]
                most = -(-self.samples * columns_of(layer)[1] // len(batches))
                drawn = torch.Generator().manual_seed(0).set_state(states[call.name])
                seen[call.name] = read_vectors(layer, call.input, most, drawn)
                generators[call.name] = drawn
                if len(seen) == len(modules):
                    raise _Seen

            with observing(modules, before), suppress(_Seen):
                run(rows)
            return seen

        for batch in batches:
            states = {path: generator.get_state() for path, generator in generators.items()}
            wanted: dict[str, Tensor] = {}
            if self.full_inputs:
                with full_precision(runs[1].unit):
                    wanted = vectors(runs[1], batch)
            for path, read in vectors(runs[0], batch).items():
                moments[path].add(read, wanted.get(path))
        for path, layer in modules.items():
            gain = round_layer(layer, moments[path], self)
            say(f"  {path}: {gain:.2f} times the error of rounding to nearest", level=2)


class _Seen(Exception):
    """Ends a run of a unit once the layers have been reached."""


def _in_order(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that read one tensor together; their groups in the order of execution."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.reads, []).append(layer)
    return list(groups.values())


def round_layer(layer: QuantizedLayer, moments: Moments, options: GPTQ) -> float:
    """Decide the codes of a layer, and its bias.

    Args:
        layer: its weights have ranges and no codes.
        moments: of its inputs.
        options: how.

    Returns:
        The squared error of its output over the moments, as a share of that of rounding to nearest (without a
        change of the bias).
    """
    pairs = layer.weight_pairs()
    number_format = pairs[0][0].format
    parts = [part.shape[1] for _, part in pairs]
    weight = torch.cat([part for _, part in pairs], 1)
    scale = torch.cat([_spread(quantizer.scale, part) for quantizer, part in pairs], 1)
    zero = torch.cat([_spread(quantizer.zero_point, part) for quantizer, part in pairs], 1)
    moves_bias = options.bias and layer.bias is not None
    hessians = moments.hessian(moves_bias)
    plain = moments.hessian(False) if moves_bias else hessians
    missed, gap = moments.missed(moves_bias), moments.gap
    codes, shifts = [], []
    nearest_error = found_error = 0.0
    groups = zip(
        *(tensor.flatten(1).float().chunk(len(hessians)) for tensor in (weight, scale, zero)), strict=True
    )
    for group, (own, step, origin) in enumerate(groups):
        grid, hessian = Grid(step, origin, number_format), hessians[group]
        aim = own if missed is None else made_up_for(own, hessian, missed[group], options.damping)
        found = round_rows(own, grid, hessian, options.damping, aim)
        codes.append(grid.codes(found.values))
        shift = (own - found.values) @ moments.mean[group]
        shifts.append(shift if gap is None else shift + own @ gap[group])
        found_error += found.error
        if moves_bias:
            nearest_error += float(quadratic_error(aim, grid.values(own), plain[group]).sum())
        else:
            nearest_error += found.nearest_error
    decided = torch.cat(codes).view(weight.shape).to(code_type(number_format))
    for (quantizer, _), own_codes in zip(pairs, decided.split(parts, 1), strict=True):
        quantizer.codes = own_codes.contiguous()
    if moves_bias:
        assert layer.bias is not None
        layer.tuned_bias = layer.bias + torch.cat(shifts).to(layer.bias.dtype)
    return found_error / nearest_error if nearest_error else 1.0


def _spread(values: Tensor, part: Tensor) -> Tensor:
    return over_weight(values, part.shape).expand_as(part)


METHOD = Method(
    "gptq",
    "GPTQ, Frantar et al., ICLR 2023, arXiv 2210.17323",
    "roundings in closed form by the second moments of layers' inputs, in minutes",
    (
        WeightRanges("lp"),
        GPTQ(),
        ActivationRanges("lp"),
    ),
)
