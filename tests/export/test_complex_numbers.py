"""Complex arithmetic is traced as real arithmetic that computes the same (oracle: torch's complex numbers)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qdeploy.export.complex_numbers import complex_as_real
from qdeploy.system.errors import InvalidInputError


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Qwen-Image's: tables are polar numbers, cut, expanded, joined and multiplied."""
    table = torch.polar(torch.ones_like(angles), angles)  # (tokens, pairs)
    first, second = table.split([1, 1], dim=-1)
    table = torch.cat([first, second], dim=-1).unsqueeze(1)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * table
    return torch.view_as_real(turned).flatten(3)


def moved(x: Tensor, angles: Tensor) -> Tensor:
    """Axes counted from behind, stacked, permuted, cut."""
    number = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    both = torch.stack([number, number.conj()], dim=-1).transpose(-1, -2)
    both = both.permute(0, 2, 1, 3, 4)[:, :, :1].expand(-1, -1, 3, -1, -1)
    return torch.view_as_real(both.repeat(1, 1, 1, 1, 2)).sum(-1)


def calculated(x: Tensor, angles: Tensor) -> Tensor:
    number = torch.complex(x, x.flip(1))
    product = (number + number * number - number.conj()) * x
    return product.abs() + product.real - (-product).imag


def from_a_table(x: Tensor, angles: Tensor) -> Tensor:
    """A constant of complex numbers, rows chosen by index."""
    table = torch.polar(torch.ones(5, 2), torch.arange(10.0).reshape(5, 2))
    rows = table[torch.tensor([3, 1, 4])]
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * rows[:, None]).flatten(
        3
    )


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("turned", torch.polar(torch.tensor(1.0), torch.tensor(0.3)))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.function(x, angles) * self.turned.abs()


@pytest.mark.parametrize("function", [rotary, moved, calculated, from_a_table])
def test_real_arithmetic_computes_the_same(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 2, 4), torch.randn(3, 2)
    program = torch.export.export(_Function(function), inputs)
    expected = program.module()(*inputs)
    program = complex_as_real(program)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        assert not (isinstance(value, Tensor) and value.is_complex()), node
    torch.testing.assert_close(program.module()(*inputs), expected)


def test_a_program_of_real_numbers_is_left_alone() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert complex_as_real(program) is program


def test_what_has_no_real_form_is_named() -> None:
    program = torch.export.export(
        _Function(lambda x, angles: torch.fft.fft(x).abs()), (torch.ones(1, 2), torch.ones(1))
    )
    with pytest.raises(InvalidInputError, match="fft"):
        complex_as_real(program)
