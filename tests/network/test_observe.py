"""Observing modules: every call is reported, nothing is changed, and nothing is left behind."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from qdeploy.network.observe import ModuleCall, observing


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))


def hooks_of(module: nn.Module) -> list[OrderedDict[int, object]]:
    return [m.__dict__[name] for m in module.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]


def test_calls_are_reported_before_and_after_with_inputs_and_outputs() -> None:
    model, x = network(), torch.randn(5, 3)
    calls: list[tuple[str, ModuleCall]] = []
    layers = {"first": model[0], "last": model[2]}
    with observing(layers, lambda call: calls.append(("<", call)), lambda call: calls.append((">", call))):
        y = model(x)
    assert [(when, call.name) for when, call in calls] == [
        ("<", "first"),
        (">", "first"),
        ("<", "last"),
        (">", "last"),
    ]
    assert calls[0][1].input.data_ptr() == x.data_ptr()
    assert calls[0][1].output is None
    assert calls[3][1].output is y
    torch.testing.assert_close(calls[2][1].input, nn.functional.silu(model[0](x)), rtol=0, atol=0)


def test_observing_changes_no_output_and_leaves_no_hook() -> None:
    model, x = network(), torch.randn(5, 3)
    expected = model(x)
    with observing(dict(model.named_modules()), lambda call: None, lambda call: None):
        assert torch.equal(model(x), expected)
    assert not any(hooks_of(model))


def test_hooks_go_even_if_an_observer_ends_the_pass() -> None:
    model = network()

    def stop(call: ModuleCall) -> None:
        raise StopIteration

    with pytest.raises(StopIteration), observing({"a": model[0], "b": model[2]}, stop):
        model(torch.randn(1, 3))
    assert not any(hooks_of(model))


def test_what_an_observer_returns_takes_the_output_s_place() -> None:
    model, x = network(), torch.randn(5, 3)
    with observing({"last": model[2]}, after=lambda call: call.output + 1):
        moved = model(x)
    assert torch.equal(moved, model(x) + 1)


def test_keyword_arguments_are_reported() -> None:
    seen: list[ModuleCall] = []
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(1, 3, 4)
    with observing({"attention": attention}, seen.append):
        attention(x, key=x, value=x, need_weights=False)
    assert set(seen[0].kwargs) == {"key", "value", "need_weights"}
