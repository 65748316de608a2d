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
- a channel that would be worse than rounded to nearest stays so.

Coordinate descent on the codes afterwards (QuantEase, Behdin et al. 2023, arXiv 2309.01885) was tried and left out:
it lowers the error of each layer, and not that of the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.quadratic import Grid, quadratic_error, round_rows
from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.calibrate.rounding import undecided
from qdeploy.calibrate.second_moments import Moments, columns_of, read_vectors
from qdeploy.calibrate.session import Session
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.network.roles import Layer
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.operators import code_type, over_weight
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ROUNDINGS, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say, track


@dataclass(frozen=True)
class GPTQ(Stage):
    """Round every weight by the second moments of what its layer reads.

    Weights whose rounding an earlier stage has decided stay as they are.

    Attributes:
        damping: share of the mean of the Hessian's diagonal that is added to it.
        samples: vectors that moments are taken of, for each input of the layer.
        bias: let the bias take over the mean of the error (Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2).
    """

    name = "gptq"
    description = "roundings in closed form, from the second moments of layers' inputs"
    needs = (WEIGHT_SCALES,)
    gives = (ROUNDINGS,)
    uniform = True

    damping: float = 0.01
    samples: int = 32
    bias: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: a number is impossible.
        """
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise UsageError(f"the damping of gptq must be between 0 and 1, not {self.damping}")
        if self.samples < 1:
            raise UsageError(f"the samples of gptq must be at least 1, not {self.samples}")

    def run(self, session: Session) -> None:
        """Decide the codes of all weights."""
        for number, (unit, layers) in enumerate(track(list(session.units.items()), "gptq")):

            def compute(unit: str = unit, layers: list[Layer] = layers) -> None:
                if not undecided(session.quantized(layers)):
                    return
                with session.weights_only(), session.problem(unit, nullcontext) as problem, torch.no_grad():
                    for readers in _in_order(layers):
                        self._round(session, problem, readers)

            session.once(f"{number:04d}", compute, prefix=unit)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        return 1.5 * units, 0

    def _round(self, session: Session, problem: UnitProblem, readers: Sequence[Layer]) -> None:
        """Round the layers that read one tensor."""
        pairs = zip(readers, session.quantized(readers), strict=True)
        modules = {layer.path: module for layer, module in pairs if undecided([module])}
        moments = {path: Moments(module) for path, module in modules.items()}
        batches = torch.arange(len(session.rows())).split(session.batch)
        generators = {path: session.generator("gptq", path) for path in modules}

        def before(call: ModuleCall) -> None:
            layer = modules[call.name]
            most = -(-self.samples * columns_of(layer)[1] // len(batches))
            moments[call.name].add(read_vectors(layer, call.input, most, generators[call.name]))

        with observing(modules, before):
            for rows in batches:
                problem.output(rows)
        for path, layer in modules.items():
            gain = round_layer(layer, moments[path], self)
            say(f"  {path}: {gain:.2f} times the error of rounding to nearest", level=2)


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
    hessians, plain = moments.hessian(moves_bias), moments.hessian(False)
    codes, shifts = [], []
    nearest_error = found_error = 0.0
    groups = zip(
        *(tensor.flatten(1).float().chunk(len(hessians)) for tensor in (weight, scale, zero)), strict=True
    )
    for group, (own, step, origin) in enumerate(groups):
        grid = Grid(step, origin, number_format)
        found = round_rows(own, grid, hessians[group], options.damping)
        codes.append(grid.codes(found))
        shifts.append((own - found) @ moments.mean[group])
        nearest_error += float(quadratic_error(own, grid.values(own), plain[group]).sum())
        found_error += float(quadratic_error(own, found, hessians[group]).sum())
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
