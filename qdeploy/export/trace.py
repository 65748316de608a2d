"""Trace a torch denoiser into an ONNX graph, without rewrites.

The network is traced with its quantizers in place. Their two operations are written as the ONNX operators
that compute the same function (`qdeploy.quant.operators`), so the graph computes what the simulation computed.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qdeploy.export.complex_numbers import complex_as_real
from qdeploy.export.slice_pairs import quick_slice_pairs
from qdeploy.model.call import time_parameter
from qdeploy.model.inputs import denoise
from qdeploy.quant import nvfp4
from qdeploy.quant.operators import onnx_translations
from qdeploy.system.errors import InvalidInputError

OPSET = 21
OUTPUT = "out_sample"


class _Call(nn.Module):
    """The denoiser as a function of plain tensors in a fixed order."""

    def __init__(self, denoiser: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        rows = next(value.shape[0] for name, value in inputs.items() if name != "timestep")
        return denoise(self.denoiser, {**inputs, "timestep": inputs["timestep"].expand(rows)})


def trace(
    denoiser: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]] | None = None
) -> ir.Model:
    """Trace a denoiser into ONNX, opset 21.

    Args:
        denoiser: in evaluation mode, quantized or not.
        inputs: one row or more of its inputs, named as `qdeploy.model.inputs.flatten_inputs` names them. The
            timestep becomes a float32 scalar: schedulers use fractional timesteps too.
        axes: axes that become dynamic besides the first ones, with their names, by input.

    Returns:
        A graph whose inputs have the same names, with a dynamic first axis ``batch``, and whose output is
        ``out_sample``.

    Raises:
        InvalidInputError: the network cannot be traced.
    """
    known = inspect.signature(denoiser.forward).parameters
    parameters = ["timestep" if name == time_parameter(known) else name for name in known]
    names = tuple(sorted(inputs, key=lambda name: (parameters.index(name.partition(".")[0]), name)))
    inputs = {name: inputs[name] for name in names}
    tensors = tuple(
        value.flatten()[0].float() if name == "timestep" else _two_rows(value)
        for name, value in inputs.items()
    )
    return export_program(_Call(denoiser, names), dict(zip(names, tensors, strict=True)), (OUTPUT,), axes)


def _two_rows(value: Tensor) -> Tensor:
    """Rows to trace with: the tracer takes an axis of size 1 for a constant."""
    return value[:2] if len(value) > 1 else torch.cat([value, value])


def export_program(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> ir.Model:
    """The ONNX graph of a module that maps plain tensors to tensors.

    Args:
        module: takes the inputs by position.
        inputs: example inputs by name; the first axis of each, where it has one, becomes dynamic.
        outputs: names of the outputs.
        axes: further axes that become dynamic, with their names, by input.

    Raises:
        InvalidInputError: the module cannot be traced.
    """
    # Some layers copy large batches to contiguous memory first; AUTO lets such a guard pass, since the graph
    # is the same on both sides of it.
    named = {
        name: {0: "batch", **(axes or {}).get(name, {})} if value.ndim else {}
        for name, value in inputs.items()
    }
    dynamic = [dict.fromkeys(known, torch.export.Dim.AUTO) for known in named.values()]
    by_position = isinstance(module, _Call)
    try:
        with _quiet(), torch.no_grad(), quick_slice_pairs():
            traced = torch.export.export(
                module.eval(),
                tuple(inputs.values()),
                dynamic_shapes=(tuple(dynamic),) if by_position else tuple(dynamic),
            )
            if by_position:
                _check_rows(traced, named)
            traced = complex_as_real(traced)
            _drop_idle_squeezes(traced.graph_module)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=onnx_translations() | nvfp4.onnx_translations(),
                verbose=False,
            )
    except Exception as error:
        # The exporter raises a dozen types of its own; the deepest cause is the one that says something.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        name = type(getattr(module, "denoiser", module)).__name__
        raise InvalidInputError(f"{name} cannot be traced into ONNX: {first}") from error
    assert program is not None
    return _name_axes(program.model, named)


def _check_rows(program: torch.export.ExportedProgram, inputs: Mapping[str, Mapping[int, str]]) -> None:
    """Refuse a network whose code makes the number of rows a constant: its engine would know that number alone."""
    users = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for name, user in zip(inputs, users, strict=True):
        rows = values[str(user)].shape[0] if inputs[name] else None
        if rows is not None and is_concrete_int(rows):
            raise ValueError(
                f"its code makes the number of rows a constant ({rows} rows of {name}), as `[0] * batch_size` does"
            )


def _drop_idle_squeezes(module: torch.fx.GraphModule) -> None:
    """Take out what squeezes an axis whose size is not 1: nothing to torch, an error to ONNX (PixArt does so)."""
    for node in list(module.graph.nodes):
        if node.target not in (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims):
            continue
        before = node.args[0]
        if node.meta["val"].ndim == before.meta["val"].ndim:
            node.replace_all_uses_with(before)
            module.graph.erase_node(node)


def _name_axes(graph: ir.Model, names: Mapping[str, Mapping[int, str]]) -> ir.Model:
    """Call the dynamic axes by their names wherever their sizes appear, as in ``2*latent_height``."""
    known = {
        str(value.shape[axis]): name
        for value in graph.graph.inputs
        for axis, name in names.get(str(value.name), {}).items()
        if value.shape and not isinstance(value.shape[axis], int)
    }
    values = [*graph.graph.inputs, *(value for node in graph.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, known) for size in value.shape])
    return graph


def _renamed(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | ir.SymbolicDim:
    """A size with the symbols in it called by other names."""
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size)))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout, which belongs to our JSON."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
