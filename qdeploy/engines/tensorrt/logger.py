"""TensorRT's messages: kept, so that an error can quote them, and shown with ``-v``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from qdeploy.system.errors import CapabilityError
from qdeploy.system.progress import say

KEPT = 200
_LEVELS = {"INTERNAL_ERROR": 2, "ERROR": 2, "WARNING": 2, "INFO": 3}

# TensorRT keeps a bare pointer to the logger that it first got, for the life of the process.
_loggers: dict[int, Any] = {}


def logger_of(trt: Any) -> Any:
    """The process's one logger: its last ``messages`` as (severity, text), and ``listeners`` that get every one."""
    if id(trt) not in _loggers:
        _loggers[id(trt)] = _make(trt)
    return _loggers[id(trt)]


def _make(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 refuses an object whose C++ half was never made
            self.messages: deque[tuple[str, str]] = deque(maxlen=KEPT)
            self.listeners: list[Callable[[str, str], None]] = []

        def log(self, severity: Any, msg: str) -> None:
            try:  # an exception here would unwind through TensorRT's own frames
                name = str(severity).rpartition(".")[2]
                self.messages.append((name, msg))
                for listener in self.listeners:
                    listener(name, msg)
                if name in _LEVELS:
                    say(f"tensorrt {name.lower()}: {msg}", level=_LEVELS[name])
            except Exception:  # noqa: S110 (an error may not cross into TensorRT's C++)
                pass

    return Logger()


def create(make: Callable[..., Any], *arguments: Any, logger: Any) -> Any:
    """One of TensorRT's objects.

    Raises:
        CapabilityError: the library gives none, which the bindings report as a ``TypeError`` or None.
    """
    try:
        made = make(*arguments)
    except TypeError as error:
        if "nullptr" not in str(error):
            raise
        made = None
    if made is None:
        raise CapabilityError(f"TensorRT cannot start: {last_errors(logger)}")
    return made


def last_errors(logger: Any, most: int = 3) -> str:
    """The last errors, in one line; where there are none, the last warnings."""
    for wanted in (("ERROR", "INTERNAL_ERROR"), ("WARNING",)):
        found = [" ".join(text.split()) for severity, text in logger.messages if severity in wanted]
        if found:
            return "; ".join(found[-most:]).rstrip(".")
    return "TensorRT gave no reason"
