"""A denoiser's structure is found by running it: by what happens, never by what things are called."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.model.inputs import denoise
from qdeploy.network.roles import Layer, Structure, find_structure
from qdeploy.network.tracer import WEIGHTED
from qdeploy.system.errors import InvalidInputError
from tests.models.networks import FAMILIES, make_two_rows

Case = tuple[nn.Module, dict[str, Tensor]]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_two_rows(request.param)


@pytest.fixture(scope="module")
def structure(case: Case) -> Structure:
    return find_structure(*case)


def layers_by_hooks(network: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Input and output of each weighted layer by path, in the order of the calls, by hooks alone."""
    seen: dict[str, Any] = {}

    def watch(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(path, (args[0], output))

        return after

    handles = [
        module.register_forward_hook(watch(path))
        for path, module in network.named_modules()
        if isinstance(module, WEIGHTED)
    ]
    with torch.no_grad():
        denoise(network, inputs)
    for handle in handles:
        handle.remove()
    return seen


# -- diffusers ---------------------------------------------------------------------------------------------


def test_layers_come_in_the_order_in_which_they_run(case: Case, structure: Structure) -> None:
    assert [layer.path for layer in structure.layers] == list(layers_by_hooks(*case))
    assert [layer.order for layer in structure.layers] == list(range(len(structure.layers)))


def test_layers_are_temporal_whose_output_no_other_sample_changes(case: Case, structure: Structure) -> None:
    network, inputs = case
    others = {name: x if name == "timestep" else other(x) for name, x in inputs.items()}
    first, second = layers_by_hooks(network, inputs), layers_by_hooks(network, others)
    expected = [path for path in first if torch.equal(first[path][1], second[path][1])]
    assert [layer.path for layer in structure.layers if layer.temporal] == expected
    assert 0 < len(expected) < len(first)


def other(x: Tensor) -> Tensor:
    return (
        x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        if x.is_floating_point()
        else x + 1
    )


def test_each_layer_is_in_one_unit_and_units_run_one_after_the_other(
    case: Case, structure: Structure
) -> None:
    """QD-5: a walk over the module tree meets up blocks in reverse, and attention after all blocks."""
    network, inputs = case
    listed = [layer for unit in structure.units.values() for layer in unit]
    assert listed == sorted(structure.layers, key=listed.index)
    assert len(listed) == len(set(listed)) == len(structure.layers)
    units = list(structure.units)
    assert not any(a.startswith(f"{b}.") for a in units for b in units)
    called: list[str] = []

    def watch(unit: str) -> Callable[..., None]:
        return lambda module, args: called.append(unit)

    handles = [network.get_submodule(unit).register_forward_pre_hook(watch(unit)) for unit in units]
    with torch.no_grad():
        denoise(network, inputs)
    for handle in handles:
        handle.remove()
    assert called == units  # so they are callable modules too, each called once


def test_there_is_one_first_and_one_last_layer(structure: Structure) -> None:
    first, last = ([layer for layer in structure.layers if getattr(layer, end)] for end in ("first", "last"))
    spatial = [layer for layer in structure.layers if not layer.temporal]
    assert (first, last) == ([spatial[0]], [spatial[-1]])


def test_attention_modules_are_found(case: Case, structure: Structure) -> None:
    from diffusers.models.attention_processor import Attention

    modules = {path for path, module in case[0].named_modules() if isinstance(module, Attention)}
    assert set(structure.attentions) == modules


def test_layers_that_read_one_tensor_are_tied(case: Case, structure: Structure) -> None:
    calls = layers_by_hooks(*case)
    for layer in structure.layers:
        assert calls[layer.reads][0] is calls[layer.path][0]
        assert structure[layer.reads].unit == layer.unit
        assert structure[layer.reads].order <= layer.order
    for attention in structure.attentions:
        key, value = (structure[f"{attention}.to_{name}"] for name in "kv")
        assert key.reads == value.reads


def test_work_is_counted_at_the_traced_size(case: Case, structure: Structure) -> None:
    network, _ = case
    for path, (source, output) in layers_by_hooks(*case).items():
        module: Any = network.get_submodule(path)
        positions = output.numel() // len(output) // module.weight.shape[0]
        if len(output) == len(source) > 1:
            assert structure[path].macs == positions * module.weight.numel()


def test_a_split_shortcut_knows_the_channels_of_h_before_the_concatenation() -> None:
    """The oracle is the up block's own arithmetic: h comes first, the skipped features behind it."""
    network, inputs = make_two_rows("unet")
    structure = find_structure(network, inputs)
    found = {layer.path: layer.split for layer in structure.layers if layer.split}
    expected: dict[str, tuple[int, int]] = {}
    for number, block in enumerate(network.up_blocks):  # type: ignore[union-attr, arg-type]
        for place, resnet in enumerate(block.resnets):  # type: ignore[union-attr, arg-type]
            before = block.resnets[place - 1] if place else None  # type: ignore[union-attr, index]
            width = before.out_channels if before else network.up_blocks[number - 1].resnets[-1].out_channels  # type: ignore[union-attr, index]
            path = f"up_blocks.{number}.resnets.{place}.conv_shortcut"
            expected[path] = (width, resnet.in_channels - width)
    expected["up_blocks.0.resnets.0.conv_shortcut"] = (16, 16)  # h comes from the middle block
    assert found == expected
    # The block's other layers see the concatenation behind a normalisation: they are not split.
    assert all(path.endswith("conv_shortcut") for path in found)


# -- names -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose layers bear whatever names it is given, in whatever order it holds them."""

    def __init__(self, names: Sequence[str], into: int, out: int, keywords: bool = False) -> None:
        super().__init__()
        self.names, self.keywords = tuple(names), keywords
        parts = [nn.Conv2d(into, out, 3, padding=1), nn.Linear(4, out), nn.Conv2d(out, out, 3, padding=1)]
        parts.append(nn.Conv2d(into, out, 1))
        for name, part in sorted(zip(self.names, parts, strict=True), key=lambda pair: pair[0]):
            self.add_module(name, part)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        first, project, second, shortcut = (self.get_submodule(name) for name in self.names)
        h = first(x).relu() + project(time)[:, :, None, None]
        result: Tensor = second(h.relu()) + shortcut(x)
        return result


class Toy(nn.Module):
    """A U-Net of two levels; its up blocks are held in reverse, as DDIM's code holds them."""

    def __init__(self, block: Sequence[str], own: Sequence[str], keywords: bool = False) -> None:
        super().__init__()
        self.own, self.keywords = tuple(own), keywords
        down = nn.ModuleList([Block(block, 3, 4), Block(block, 4, 6)])
        up = nn.ModuleList()
        for part in (Block(block, 6 + 4, 5), Block(block, 5 + 3, 4)):
            up.insert(0, part)
        parts = [nn.Linear(1, 4), nn.Conv2d(3, 3, 3, padding=1), down, up, nn.Conv2d(4, 3, 3, padding=1)]
        for name, part in sorted(zip(self.own, parts, strict=True), key=lambda pair: pair[0]):
            self.add_module(name, part)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        embed, head, down, up, tail = (self.get_submodule(name) for name in self.own)
        time = embed((timestep.float() / 1000).reshape(-1, 1))
        h = head(sample)
        skips = [h]
        for block in down.children():
            h = block(h, time)
            skips.append(h)
        skips.pop()
        for block in reversed(list(up.children())):
            parts = [h, skips.pop()]
            h = block(torch.cat(tensors=parts, dim=1) if self.keywords else torch.cat(parts, 1), time)
        return (tail(h),)


USUAL = (("conv1", "time_emb_proj", "conv2", "conv_shortcut"), ("time", "conv_in", "down", "up", "conv_out"))
STRANGE = (("zulu", "yankee", "alfa", "mike"), ("tango", "zero", "papa", "bravo", "attn"))
MISLEADING = (
    ("conv_shortcut", "conv1", "time_emb_proj", "to_q"),
    ("conv_out", "up", "conv_in", "time", "down"),
)


def roles(names: tuple[tuple[str, ...], tuple[str, ...]], keywords: bool = False) -> list[Layer]:
    """The structure of a toy, its paths replaced by the usual ones."""
    network = Toy(*names, keywords=keywords).eval()
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor([3, 500])}
    usual = {
        **dict(zip(names[1], USUAL[1], strict=True)),
        **{f"block:{name}": word for name, word in zip(names[0], USUAL[0], strict=True)},
    }

    def translate(path: str) -> str:
        own, *rest = path.split(".")
        return ".".join([usual[own], *(usual.get(f"block:{part}", part) for part in rest)])

    structure = find_structure(network, inputs)
    return [
        Layer(translate(layer.path), layer.order, translate(layer.unit), translate(layer.reads), *rest(layer))
        for layer in structure.layers
    ]


def rest(layer: Layer) -> tuple[Any, ...]:
    return layer.split, layer.temporal, layer.first, layer.last, layer.macs


@pytest.mark.parametrize("names", [STRANGE, MISLEADING], ids=["strange", "misleading"])
def test_no_name_decides_anything(names: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    assert roles(names) == roles(USUAL)


def test_a_toy_is_understood() -> None:
    layers = {layer.path: layer for layer in roles(USUAL)}
    assert list(dict.fromkeys(layer.unit for layer in layers.values())) == [
        "time", "conv_in", "down.0", "down.1", "up.1", "up.0", "conv_out",
    ]  # fmt: skip
    splits = {path: layer.split for path, layer in layers.items() if layer.split}
    # Both the first convolution and the shortcut read the bare concatenation here, and share its quantizer.
    assert splits == {
        f"up.{i}.{name}": s for i, s in ((1, (6, 4)), (0, (5, 3))) for name in ("conv1", "conv_shortcut")
    }
    assert layers["up.1.conv_shortcut"].reads == "up.1.conv1"
    assert {path for path, layer in layers.items() if layer.temporal} == {
        "time", *(f"{block}.time_emb_proj" for block in ("down.0", "down.1", "up.0", "up.1")),
    }  # fmt: skip
    assert layers["conv_in"].first
    assert layers["conv_out"].last


def test_a_concatenation_by_keyword_is_one_too() -> None:
    assert roles(USUAL, keywords=True) == roles(USUAL)


class Tokens(nn.Module):
    """A network on tokens: concatenations along features, along tokens, of three parts, and of times."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.features, self.three = nn.Linear(4, 6), nn.Linear(9, 6), nn.Linear(18, 6)
        self.tokens, self.grouped = nn.Linear(6, 6), nn.Conv1d(8, 4, 1, groups=2)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        t = timestep.float().reshape(-1, 1) / 1000
        time = self.time(torch.cat([t.expand(-1, 2), t.expand(-1, 2).cos()], dim=-1))[:, None]
        x = sample.flatten(2)[..., :6] + time
        x = self.features(torch.cat([x, x[..., :3]], dim=2))
        x = self.three(torch.cat([x, x, x], dim=-1))
        x = self.tokens(torch.cat([x, x[:, :1]], dim=1))
        return (self.grouped(torch.cat([x, x], dim=1)),)


def test_only_two_parts_along_the_channels_that_are_multiplied_are_split() -> None:
    """Not tokens, not three parts, not groups of channels, and not what depends on the timestep alone."""
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor([3, 500])}
    structure = find_structure(Tokens().eval(), inputs)
    assert len(structure.layers) == 5
    assert {layer.path: layer.split for layer in structure.layers if layer.split} == {"features": (6, 3)}


def test_tracing_leaves_nothing_behind(case: Case) -> None:
    network, inputs = case
    before = {name: value.clone() for name, value in network.state_dict().items()}
    find_structure(network, inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_tracing_holds_no_values_of_layers_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network of a billion parameters computes on its way does not fit into memory at once."""
    network, inputs = make_two_rows("unet")
    alive: list[Any] = []
    convolve, most = nn.functional.conv2d, 0

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        output = convolve(*args, **kwargs)
        alive[:] = [seen for seen in alive if seen() is not None] + [weakref.ref(output)]
        most = max(most, len(alive))
        return output

    monkeypatch.setattr(nn.functional, "conv2d", watched)
    with torch.no_grad():
        denoise(network, inputs)
    alone, most = most, 0
    find_structure(network, inputs)
    assert most <= alone + 1


def test_a_network_that_fails_is_left_without_hooks() -> None:
    network, inputs = make_two_rows("unet")
    with pytest.raises(InvalidInputError):
        find_structure(network, inputs | {"sample": noise(2, 5, 8, 8)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_that_takes_several_rows_of_an_input_for_one_of_its_sample_is_refused() -> None:
    """As AnimateDiff, which is given the prompt once for every frame."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> tuple[Tensor]:
            return (self.layer(sample.flatten(0, 1)) + states,)

    inputs = {"sample": torch.ones(2, 4, 3), "timestep": torch.ones(2), "states": torch.ones(8, 3)}
    with pytest.raises(InvalidInputError, match="does not run with one row"):
        find_structure(Frames(), inputs)
