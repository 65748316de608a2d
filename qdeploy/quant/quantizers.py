"""Quantizers of activations and of weights: scales, zero points, codes, and arithmetic as an engine does it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.network.current_timestep import CurrentTimestep
from qdeploy.quant.nvfp4 import fake_quantize_nvfp4, float8_scales, tensor_scale, two_level_scales
from qdeploy.quant.operators import code_type, dequantize_codes, over_weight, round_float, to_grid
from qdeploy.quant.packing import fills_bytes, pack, packed_bytes, unpack
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import CapabilityError, InvalidInputError


class ActivationQuantizer(nn.Module):
    """Quantization of a layer's input, with one scale; or one for each group of timesteps; or along an axis.

    Layers that read the same tensor share one of these. Where scales are outside a layer's sum (they
    depend on the timestep or on the token) the tensor is multiplied by s0 / s and quantized with one nominal
    scale s0; `restore` multiplies what a layer computes from it by s / s0. That is how an engine computes it
    too, whose scales are constants. Scales along the features are inside the sum: they are a simulation.
    In nvfp4 the scale decides the tensor's level of scales alone, and blocks get theirs in every call.

    Attributes:
        scale: [], or [K] for groups of timesteps, or [A] along an axis, or [K, A].
        zero_point: codes of zero, shaped like ``scale``; or [] where one serves all groups of timesteps.
        edges: [K - 1] timesteps between the groups, ascending; empty for one group.
        axis: the input's axis that scales run along; None for one scale per tensor.
        current_timestep: of the running call; needed where there are several groups.
    """

    scale: Tensor
    zero_point: Tensor
    edges: Tensor
    frozen: Tensor | None
    nominal: Tensor | None
    to_nominal: Tensor | None
    from_nominal: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, number_format: Format) -> None:
        super().__init__()
        self.format = number_format
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("edges", torch.zeros(0))
        for name in ("frozen", "nominal", "to_nominal", "from_nominal", "tensor_scale"):
            self.register_buffer(name, None)
        self.axis: int | None = None
        self.current_timestep: CurrentTimestep | None = None
        self.known_edges: tuple[float, ...] | None = None
        self.enabled = True

    def set(
        self, scale: Tensor, zero_point: Tensor, edges: Tensor | None = None, axis: int | None = None
    ) -> None:
        """Store ranges.

        Args:
            scale: positive; [] or, along an axis, [A]. With edges, one entry for each group in front.
            zero_point: shaped like ``scale``; or [] for one that serves all groups of timesteps.
            edges: [K - 1]; a single group is stored as if there were none.
            axis: of the input; -1 or 1 for features, -2 for tokens.
        """
        if edges is not None and not len(edges):
            scale, zero_point = scale[0], zero_point[0] if zero_point.ndim else zero_point
        device = self.scale.device
        self.scale = scale.to(device, torch.float32, copy=True)
        self.zero_point = zero_point.to(device, torch.int32, copy=True)
        self.edges = (torch.zeros(0) if edges is None else edges.float()).to(device)
        self.axis = axis

    @property
    def banked(self) -> bool:
        """Whether there is a scale for each group of timesteps."""
        return len(self.edges) > 0

    @property
    def simple(self) -> bool:
        """Whether there is but one scale."""
        return not self.banked and self.axis is None

    @property
    def along(self) -> str:
        """A word for what the scales run along, for messages."""
        return "tokens" if self.axis == -2 else "channels"

    @property
    def hoisted(self) -> bool:
        """Whether scales are taken out of the quantization; a zero point that moves forbids it."""
        fixed = self.format.symmetric or not self.zero_point.ndim
        return not self.simple and fixed and self.axis in (None, -2)

    @property
    def fixed_zero_point(self) -> Tensor:
        """The code of zero that serves all groups, of a hoisted quantizer."""
        return self.zero_point if not self.zero_point.ndim else self.zero_point.new_zeros(())

    def freeze(self) -> None:
        """Compute with the exported operators from now on.

        Raises:
            CapabilityError: a zero point depends on the timestep, or scales run along the features.
        """
        stored = code_type(self.format)
        if self.simple and self.format.two_levels:
            self.tensor_scale = tensor_scale(self.scale)
            return
        if self.simple:
            self.frozen = self.zero_point.to(stored)
            return
        if not self.hoisted:
            moves = self.axis in (None, -2)
            what = "a zero point that moves" if moves else "a scale for each input channel"
            raise CapabilityError(f"{what} is not possible in a static integer kernel: this is a simulation")
        self.frozen = self.fixed_zero_point.to(stored)
        self.known_edges = tuple(self.edges.tolist())
        self.nominal = _nominal(self.scale)
        self.to_nominal, self.from_nominal = self.nominal / self.scale, self.scale / self.nominal

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        scale, zero_point = self.scale, self.zero_point
        if self.hoisted:
            nominal = _nominal(scale) if self.nominal is None else self.nominal
            x = x * self._over(nominal / scale if self.to_nominal is None else self.to_nominal, x)
            scale, zero_point = nominal, self.fixed_zero_point
        elif not self.simple:
            scale, zero_point = self._over(scale, x), self._over(zero_point, x)
        if self.format.two_levels:
            if self.tensor_scale is not None:
                rounded: Tensor = torch.ops.qdeploy.fake_quantize_nvfp4(x, self.tensor_scale)
                return rounded
            return fake_quantize_nvfp4(x, tensor_scale(scale))
        if self.frozen is not None:
            traced: Tensor = torch.ops.qdeploy.quantize_dequantize(x, scale, self.frozen)
            return traced
        return to_grid(x, scale, zero_point, self.format)

    def restore(self, y: Tensor) -> Tensor:
        """Undo the per-timestep rescaling on a result that is linear in this quantizer's output."""
        if not self.enabled or not self.hoisted:
            return y
        factor = self.scale / _nominal(self.scale) if self.from_nominal is None else self.from_nominal
        return y * self._over(factor, y)

    def _over(self, values: Tensor, x: Tensor) -> Tensor:
        """Entries of the running timesteps, shaped so that they broadcast over ``x`` [B, ...]."""
        shape = [1] * x.ndim
        if self.axis is not None:
            if x.shape[self.axis] != values.shape[-1]:
                raise InvalidInputError(
                    f"scales were calibrated for {values.shape[-1]} {self.along}, not {x.shape[self.axis]}"
                )
            shape[self.axis] = values.shape[-1]
        if not self.banked:
            return values.view(shape)
        assert self.current_timestep is not None, "scales that depend on the timestep need the current one"
        shape[0] = -1
        chosen = values.view(shape).index_select(0, self.current_timestep.index(self.edges, self.known_edges))
        if len(chosen) > 1 and len(chosen) != len(x):  # rows that were folded into the first axis, in order
            chosen = chosen.repeat_interleave(len(x) // len(chosen), 0)
        return chosen


def _nominal(scale: Tensor) -> Tensor:
    """The constant scale s0 of a bank: its geometric mean, so that ratios stay near 1."""
    return scale.detach().log().mean().exp()


class WeightQuantizer(nn.Module):
    """Quantization of a weight, or of one part of it along the input channels.

    Args:
        number_format: the grid.
        channels: of the output.
        features: of the input; needed where the format has blocks.

    Attributes:
        scale: [C] steps per output channel; [C, blocks] where blocks of input features have their own, in nvfp4 as
            of `qdeploy.quant.nvfp4.two_level_scales`.
        zero_point: codes of zero, shaped like ``scale``.
        shape: that ``scale`` is to have.
        held: quantized weights, several in a byte where whole ones fit, once rounding is decided; until then None,
            and the weight is rounded to nearest.
        rounding: a module that computes the (soft) weight while rounding is being learned; else None.
    """

    scale: Tensor
    zero_point: Tensor
    held: Tensor | None
    frozen: Tensor | None
    block_scale: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, number_format: Format, channels: int, features: int = 0) -> None:
        super().__init__()
        self.format = number_format
        shape = (channels, features // number_format.block) if number_format.block else (channels,)
        self.shape = torch.Size(shape)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        for name in ("held", "frozen", "block_scale", "tensor_scale"):
            self.register_buffer(name, None)
        self.rounding: nn.Module | None = None
        self._codes_shape: tuple[int, ...] = ()

    @property
    def codes(self) -> Tensor | None:
        """The quantized weight [C, ...], once rounding is decided, in the type of its format."""
        if self.held is None or not fills_bytes(self.format):
            return self.held
        return unpack(self.held, self.format, self._codes_shape)

    @codes.setter
    def codes(self, codes: Tensor | None) -> None:
        self._codes_shape = () if codes is None else tuple(codes.shape)
        self.held = pack(codes, self.format) if codes is not None and fills_bytes(self.format) else codes

    def hold(self, stored: Tensor, shape: tuple[int, ...]) -> None:
        """Take codes as they are stored; what is mapped from a file stays there.

        Args:
            stored: packed codes, as many as ``shape`` has places.
            shape: [C, ...] of the codes.

        Raises:
            RuntimeError: there are more or fewer of them.
        """
        needed = packed_bytes(torch.Size(shape).numel(), self.format)
        if stored.nbytes != needed:
            raise RuntimeError(f"{stored.nbytes} bytes of codes instead of {needed}")
        held = stored if fills_bytes(self.format) else unpack(stored.cpu(), self.format, shape)
        self.held, self._codes_shape = held.to(self.scale.device), shape

    def stored_codes(self) -> Tensor:
        """The codes as a checkpoint stores them (see `qdeploy.quant.packing`); rounding has to be decided."""
        assert self.held is not None
        return self.held if fills_bytes(self.format) else pack(self.held.cpu(), self.format)

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store ranges, shaped as they are. Codes that were decided on another grid are dropped."""
        self.scale.copy_(two_level_scales(scale) if self.format.two_levels else scale)
        self.zero_point.copy_(zero_point)
        self.codes = None

    @property
    def decided(self) -> bool:
        """Whether it holds the quantized weight itself."""
        return any(part is not None for part in (self.held, self.frozen, self.rounding))

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes of ``weight`` [C, ...] rounded to nearest, in the type that they are stored in."""
        steps, low, high = weight / over_weight(self.scale, weight.shape), self.format.qmin, self.format.qmax
        if self.format.two_levels:
            return round_float(steps, self.format).to(code_type(self.format))
        if self.format.floating:
            return steps.clamp(low, high).to(code_type(self.format))
        codes = torch.round(steps) + over_weight(self.zero_point, weight.shape)
        return codes.clamp(low, high).to(code_type(self.format))

    def forward(self, weight: Tensor | None) -> Tensor:
        if self.rounding is not None:
            soft: Tensor = self.rounding()
            return soft
        if self.frozen is not None:
            traced: Tensor
            if self.block_scale is not None:
                traced = torch.ops.qdeploy.dequantize_nvfp4(self.frozen, self.block_scale, self.tensor_scale)
            elif self.format.block:
                traced = torch.ops.qdeploy.dequantize_blocks(self.frozen, self.scale, self.format.block)
            else:
                traced = torch.ops.qdeploy.dequantize(self.frozen, self.scale)
            return traced
        codes = self.codes
        if codes is None:
            assert weight is not None
            codes = self.nearest(weight)
        return dequantize_codes(codes, self.scale, self.zero_point)

    def freeze(self) -> None:
        """Compute with the exported operator from now on.

        Integers become ``codes - zero_point`` in int8: the same weights for an int8 kernel, bit for bit. The
        codes themselves are let go.
        """
        codes = self.codes
        assert codes is not None
        if self.format.two_levels:
            self.block_scale, self.tensor_scale = float8_scales(self.scale)
        if self.format.floating:
            self.frozen = codes.clone()
        elif self.format.symmetric:
            self.frozen = codes.to(torch.int8)
        else:
            self.frozen = (codes - over_weight(self.zero_point, codes.shape)).to(torch.int8)
        if self.frozen is not None and self.format.block and not self.format.floating:
            # of a convolution of one pixel too, which is written as a product of matrices
            self.frozen = self.frozen.flatten(1)
        self.codes = None
