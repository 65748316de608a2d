"""A pretend accelerator, so that ``--device`` is tested where there is none.

Tensors of the device ``pretend`` wrap tensors of the CPU. One fallback runs every operator on what is wrapped,
and raises where a tensor of the CPU that is no scalar meets one of the device, as CUDA does. Copies between
the two are counted by the place in the code that asked for them.

`register` changes torch for the rest of the process, so tests use it in a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map

NAME = "pretend"
KEY = "PrivateUse1"

to_host: Counter[str] = Counter()
to_device: Counter[str] = Counter()

# Operators whose kernels for every device would lose the wrapper, or compute strides from the wrapper's, which
# are always those of a contiguous tensor.
_VIEWS = (
    "alias", "detach", "diagonal", "expand", "lift", "lift_fresh", "permute", "select.int", "slice.Tensor",
    "split.Tensor", "split_with_sizes", "squeeze", "squeeze.dim", "squeeze.dims", "t", "transpose.int",
    "unbind.int", "unfold", "unsqueeze", "view.dtype",
)  # fmt: skip
# Operators that size their result by `out`, which would leave the wrapper's size behind.
_FACTORIES = (
    "arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "randperm.generator",
)  # fmt: skip
_SIZED_BY_OUT = (
    "abs", "angle", "bitwise_and.Scalar", "hardtanh", "logical_and", "logical_not", "logical_or", "logical_xor",
    "remainder.Scalar",
)  # fmt: skip
# CUDA takes indices from the CPU, too; and these are copies between devices by definition.
_MIXED = ("index", "index_put_", "index_put", "_index_put_impl_", "copy_", "_copy_from", "_to_copy")
# Copies that autograd makes of saved results are plain tensors, but share the storage of the wrapper.
_memory: dict[int, torch.Tensor] = {}
_libraries: list[torch.library.Library] = []


class PretendTensor(torch.Tensor):
    """A tensor whose memory is that of ``host``, a tensor of the CPU."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
        made.__class__ = PretendTensor
        made.host = host
        _memory[made.untyped_storage()._cdata] = host
        return made

    def __init__(self, host: torch.Tensor) -> None:
        pass


class _Module(backend_registration._DummyBackendModule):
    """What ``torch.pretend`` offers: random numbers are drawn on the CPU."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass


def register() -> None:
    """Make ``torch.device("pretend")`` usable in this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # A module's parameters are replaced, since `data` of another kind cannot be set.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, KEY)
    for name in (*_VIEWS, *_SIZED_BY_OUT):
        aten.impl(name, partial(_run, _operator(name)), KEY)
    for name in ("view", "_unsafe_view", "_reshape_alias"):
        aten.impl(name, _reshape, KEY)
    aten.impl("as_strided", _as_strided, KEY)
    for name in _FACTORIES:
        aten.impl(name, partial(_make, name), KEY)
    aten.impl("empty.memory_format", _empty, KEY)
    aten.impl("empty_strided", _empty_strided, KEY)
    aten.impl("_copy_from", _copy, KEY)
    aten.impl("_copy_from_and_resize", _copy, KEY)
    aten.impl("_local_scalar_dense", _item, KEY)
    aten.impl("convolution_overrideable", partial(_run, torch.ops.aten.convolution.default), KEY)
    aten.impl("convolution_backward_overrideable", _convolution_backward, KEY)
    _libraries.extend((everything, aten))


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map(_recovered, (args, kwargs))
    given = list(_tensors((args, kwargs)))
    name = operator.name().partition("::")[2].partition(".")[0]
    if name not in _MIXED:
        _refuse_mixed(operator, given)
    host_args, host_kwargs = tree_map(_unwrapped, (args, kwargs))
    stale = [x for x in given if isinstance(x, PretendTensor)]
    result = operator(*host_args, **host_kwargs)
    if resized := [x for x in stale if x.host.shape != x.shape]:
        raise RuntimeError(
            f"{operator.name()} resized a tensor of the pretend accelerator to {resized[0].host.shape}"
        )
    return _wrapped(result, given)


def _recovered(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, PretendTensor) or value.device.type != NAME:
        return value
    return PretendTensor(_memory[value.untyped_storage()._cdata])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))


def _refuse_mixed(operator: Any, given: list[torch.Tensor]) -> None:
    ours = [x for x in given if isinstance(x, PretendTensor)]
    others = [x for x in given if not isinstance(x, PretendTensor) and x.ndim > 0]
    if ours and others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME} and cpu: "
            f"{operator.name()} at {_place()}"
        )


def _unwrapped(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _wrapped(result: Any, given: list[torch.Tensor]) -> Any:
    """Results on the device; what an operator changed in place is the very tensor that it was given."""
    known = {id(x.host): x for x in given if isinstance(x, PretendTensor)}

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else PretendTensor(x)

    return tree_map(wrap, result)


def _convolution_backward(gradient: Any, x: Any, weight: Any, *rest: Any) -> Any:
    bias = [weight.shape[0]] if rest[-1][2] else None
    return _run(torch.ops.aten.convolution_backward.default, gradient, x, weight, bias, *rest)


def _make(name: str, *args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> PretendTensor:
    return PretendTensor(_operator(name)(*args, **{**kwargs, "device": torch.device("cpu")}))


def _operator(name: str) -> Any:
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload or "default")


def _reshape(x: PretendTensor, size: Any, stride: Any = None) -> PretendTensor:
    x = _recovered(x)
    return PretendTensor(x.host.reshape(size))


def _as_strided(x: PretendTensor, size: Any, stride: Any, offset: Any = None) -> PretendTensor:
    """Strides come from the wrapper, which is contiguous: of a view they are those of its contiguous copy.

    What is then written in place does not reach the view, and shows as a difference from the CPU.
    """
    x = _recovered(x)
    return PretendTensor(x.host.contiguous().as_strided(size, stride, offset))


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **_: Any) -> PretendTensor:
    chosen = {} if memory_format is None else {"memory_format": memory_format}
    return PretendTensor(torch.empty(size, dtype=dtype, **chosen))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> PretendTensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    source, target = _recovered(source), _recovered(target)
    if isinstance(source, PretendTensor) and not isinstance(target, PretendTensor):
        to_host[_place()] += 1
    elif isinstance(target, PretendTensor) and not isinstance(source, PretendTensor):
        to_device[_place()] += 1
    _unwrapped(target).copy_(_unwrapped(source))
    return target


def _item(x: PretendTensor) -> Any:
    to_host[_place()] += 1
    return _recovered(x).host.item()


def _place() -> str:
    """The line of the package that asked for the running operator."""
    for frame in reversed(traceback.extract_stack()):
        if "/qdeploy/" in frame.filename:
            return f"{frame.filename.rpartition('/qdeploy/')[2]}:{frame.lineno}"
    return "elsewhere"
