"""Calling an engine: the order of calls, types, addresses and lifetimes that TensorRT insists on.

    profile -> set_input_shape for all -> infer_shapes -> outputs -> set_tensor_address for all -> execute

Nearly all of these report a failure by what they return, not by an exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from qdeploy.engines.tensorrt.logger import last_errors, logger_of
from qdeploy.engines.tensorrt.plan import Plan
from qdeploy.engines.tensorrt.ports import read_ports
from qdeploy.engines.tensorrt.profiles import choose_profile, describe
from qdeploy.engines.tensorrt.runtime_cache import RuntimeCache
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

ALIGNMENT = 256


class Cuda(Protocol):
    """What this needs of torch on a GPU; see `qdeploy.engines.tensorrt.cuda`."""

    stream: int

    def empty(self, shape: tuple[int, ...], dtype: str, host: bool = False) -> Any:
        """A new buffer, on the GPU unless ``host``."""

    def enter(self, tensors: Mapping[str, Any]) -> None:
        """Let our stream wait for the caller's, and keep the caller's tensors alive until it is done."""

    def leave(self, tensors: Mapping[str, Any]) -> None:
        """Let the caller's stream wait for ours, and keep our outputs alive until it is done."""

    def copy(self, source: Any, target: Any) -> None:
        """Copy on our stream."""

    def clone(self, source: Any) -> Any:
        """A copy on our stream."""

    def capture(self, work: Any) -> Any:
        """What replays ``work`` as a CUDA graph."""

    def synchronize(self) -> None:
        """Wait for our stream."""


@dataclass
class _Captured:
    """A CUDA graph with the buffers whose addresses are in it."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    replay: Any


class Execution:
    """An engine that can be called with tensors on the GPU.

    Args:
        trt: the module.
        plan: an open plan, which this does not close.
        cuda: the GPU's memory and streams.
        graphs: record each set of shapes as a CUDA graph and replay it.
        kept: kernels kept from earlier runs, with which the library records graphs itself; None where it cannot.

    Raises:
        InvalidInputError: TensorRT cannot make a context, or an output's size is unknown beforehand.
    """

    def __init__(
        self, trt: Any, plan: Plan, cuda: Cuda, graphs: bool = True, kept: RuntimeCache | None = None
    ) -> None:
        self._kept = kept
        self.logger, self.plan, self.cuda = logger_of(trt), plan, cuda
        self.ports = read_ports(trt, plan.engine)
        # Weights that stream make the call wait for copies, which no graph can record.
        self.graphs = graphs and not plan.sidecar["options"]["weight_streaming"]
        engine = plan.engine
        self.context = (
            engine.create_execution_context()
            if kept is None
            else engine.create_execution_context(kept.config)
        )
        if self.context is None:
            raise InvalidInputError(f"TensorRT cannot run the plan: {last_errors(self.logger)}")
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._outputs: dict[str, tuple[int, ...]] = {}
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run.

        Args:
            inputs: contiguous tensors of exactly the engine's types, where the engine wants them.

        Returns:
            Outputs by name, tensors of their own.

        Raises:
            InvalidInputError: an input does not fit, or TensorRT reports a failure.
        """
        self._check(inputs)
        self.cuda.enter(inputs)
        shapes = {name: tuple(x.shape) for name, x in inputs.items()}
        outputs = self._replayed(inputs, shapes) if self.graphs else None
        if outputs is None:
            outputs = self._run(self._aligned(inputs), shapes)
        self.cuda.leave(outputs)
        return outputs

    def close(self) -> None:
        """Free graphs and context; the engine and its runtime come after."""
        self.cuda.synchronize()
        self._captured.clear()
        if self._kept is not None:
            self._kept.save()
        self.context = None

    # -- one call ------------------------------------------------------------------------------------------

    def _run(self, inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        self._set_shapes(shapes)
        outputs = {
            port.name: self.cuda.empty(self._outputs[port.name], port.dtype, port.host)
            for port in self.ports.values()
            if not port.is_input
        }
        self._bind(inputs, outputs)
        self._execute()
        return outputs

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Profile and shapes, where they changed; and from them the outputs' shapes."""
        if shapes == self._shapes:
            return
        self._shapes = {}
        number = choose_profile(self.plan.profiles, shapes) if self.plan.profiles else 0
        if number is None:
            given = ";".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            raise InvalidInputError(
                f"the plan takes {describe(self.plan.profiles)}, not {given}: build it with other --shapes"
            )
        if number != self._profile:
            self._switch(number)
        for name, shape in shapes.items():
            self._require(self.context.set_input_shape(name, shape), f"the shape of {name!r}")
        if missing := self.context.infer_shapes():
            raise InvalidInputError(f"TensorRT lacks the shapes of {', '.join(map(str, missing))}")
        for port in self.ports.values():
            if not port.is_input:
                shape = tuple(self.context.get_tensor_shape(port.name))
                if -1 in shape:
                    raise InvalidInputError(
                        f"the size of {port.name!r} depends on data: export another graph"
                    )
                self._outputs[port.name] = shape
        self._shapes = dict(shapes)

    def _switch(self, number: int) -> None:
        try:  # the one call whose failure the bindings raise
            done = self.context.set_optimization_profile_async(number, self.cuda.stream)
        except RuntimeError:
            done = False
        self._require(done, "the profile")
        self._profile = number

    def _bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for name, tensor in {**inputs, **outputs}.items():
            self._require(
                self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name!r}"
            )

    def _execute(self) -> None:
        self._require(self.context.execute_async_v3(self.cuda.stream), "the call")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise InvalidInputError(f"TensorRT refuses {what}: {last_errors(self.logger)}")

    # -- CUDA graphs ---------------------------------------------------------------------------------------

    def _replayed(
        self, inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any] | None:
        """Outputs by a recorded graph, one for each set of shapes; None where recording fails."""
        key = tuple(sorted(shapes.items()))
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(inputs, shapes)
            except (RuntimeError, InvalidInputError) as error:  # something in the plan cannot be recorded
                say(f"warning: no CUDA graph for this engine: {str(error).splitlines()[0]}")
                self.graphs = False
                return None
        captured = self._captured[key]
        for name, x in inputs.items():
            self.cuda.copy(x, captured.inputs[name])
        captured.replay()
        return {name: self.cuda.clone(x) for name, x in captured.outputs.items()}

    def _capture(self, inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> _Captured:
        # A context holds the state of one set of shapes: graphs of other shapes are void once it changes.
        self._captured.clear()
        fixed = {
            name: self.cuda.empty(shapes[name], self.ports[name].dtype, self.ports[name].host)
            for name in inputs
        }
        for name, x in inputs.items():
            self.cuda.copy(x, fixed[name])
        outputs = self._run(fixed, shapes)  # the first call after a change of shapes must not be recorded
        self.cuda.synchronize()
        # With fixed addresses, the library's own graph is replayed by a call like any other.
        replay = self.cuda.capture(self._execute) if self._kept is None else self._execute
        return _Captured(fixed, outputs, replay)

    # -- inputs --------------------------------------------------------------------------------------------

    def _check(self, inputs: Mapping[str, Any]) -> None:
        wanted = {port.name: port for port in self.ports.values() if port.is_input}
        for name in wanted.keys() ^ inputs.keys():
            raise InvalidInputError(f"the plan takes {', '.join(wanted)}: {name!r} is missing or unknown")
        for name, port in wanted.items():
            x = inputs[name]
            dtype = str(x.dtype).rpartition(".")[2]
            if dtype != port.dtype:
                raise InvalidInputError(
                    f"the plan takes {name!r} as {port.dtype}, not as {dtype}: cast it first"
                )
            if not x.is_contiguous():
                raise InvalidInputError(f"{name!r} is a view with gaps: call contiguous() first")
            if (x.device.type == "cpu") != port.host:
                place = "in the machine's memory" if port.host else "on the GPU"
                raise InvalidInputError(f"{name!r} must lie {place}, not on {x.device}")

    def _aligned(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same tensors; those that start at an odd place, as slices do, copied."""
        ready = dict(inputs)
        for name, x in inputs.items():
            if x.data_ptr() % ALIGNMENT and not self.ports[name].host:
                ready[name] = self.cuda.clone(x)
        return ready
