"""Devices that are not there are named, before anything is made on them."""

from __future__ import annotations

import pytest
import torch

from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.machine import check_device


def test_a_device_that_is_there() -> None:
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["x", "a=b", "{", "", "cpu:x"])
def test_words_that_torch_does_not_know(device: str) -> None:
    with pytest.raises(UsageError, match="there is no device"):
        check_device(device)


@pytest.mark.parametrize("device", ["cuda", "xpu", "meta", "mps", "vulkan"])
def test_devices_that_this_machine_lacks(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(CapabilityError, match="has no device"):
        check_device(device)
