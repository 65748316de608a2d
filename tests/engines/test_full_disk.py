"""A disk that is full while an engine is written: one sentence, and nothing that looks like an engine."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from qdeploy.engines.openvino_graph import save
from qdeploy.system.telemetry import import_silently


def test_openvino_reports_a_failed_write_in_words_of_its_own(small_disk: Path) -> None:
    openvino = import_silently("openvino")
    weights = openvino.opset13.constant(np.random.default_rng(0).normal(size=(1000, 100)).astype(np.float32))
    model = openvino.Model([openvino.opset13.result(weights)], [], "large")
    with pytest.raises(OSError, match="No space left") as caught:
        save(model, small_disk / "openvino_model.xml")
    assert caught.value.errno == errno.ENOSPC
