"""Images side by side with their differences, as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from qdeploy.store.artifact import Samples
from qdeploy.system.errors import InvalidInputError

LARGEST = 256  # pixels of the longer side on the page
_ALIKE = ("steps", "scheduler", "prompts", "prompt_file", "guidance", "eta", "height", "width", "shape")
_SHARE = 0.995  # of all differences that are not brighter than white
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def gallery(reference: Samples, samples: Mapping[str, Samples], count: int) -> dict[str, Any]:
    """Images of the same seeds and prompts, next to those of full precision.

    Args:
        reference: samples of the full-precision model.
        samples: of the subjects, by name.
        count: how many seeds are shown.

    Returns:
        ``amplified``, what differences are multiplied with; ``steps`` and ``scheduler``; and ``seeds``, each with
        ``seed``, ``prompt`` and ``tiles``: a ``label``, ``uri`` and ``alt``, with ``width`` and ``height``.

    Raises:
        InvalidInputError: images were not sampled in the same way from the same seeds.
    """
    for artifact in samples.values():
        _check_alike(reference, artifact)
    expected = images_of(reference)[:count]
    images = {name: images_of(artifact)[: len(expected)] for name, artifact in samples.items()}
    shown = min([len(expected), *map(len, images.values())])
    differences = {name: (own[:shown].int() - expected[:shown].int()).abs() for name, own in images.items()}
    factor = _amplification(list(differences.values()))
    prompts = reference.facts.prompts
    seeds = []
    for index in range(shown):
        seed = (reference.seed or 0) + index
        tiles = [_tile("full precision", expected[index], f"seed {seed}, full precision")]
        for name, own in images.items():
            amplified = (differences[name][index] * factor).clamp(0, 255).to(torch.uint8)
            what = f"seed {seed}, what differs between {name} and full precision"
            tiles.append(_tile(name, own[index], f"seed {seed}, {name}"))
            tiles.append(_tile(f"differ\u00adence ×{factor}", amplified, what))  # noqa: RUF001 - times, not x
        prompt = prompts[index % len(prompts)] if prompts else None
        seeds.append({"seed": seed, "prompt": prompt, "tiles": tiles})
    facts = reference.facts
    return {"amplified": factor, "steps": facts.steps, "scheduler": facts.scheduler, "seeds": seeds}


def _check_alike(reference: Samples, other: Samples) -> None:
    one, two = ({**artifact.facts.to_json(), "seed": artifact.seed} for artifact in (reference, other))
    for key in (*_ALIKE, "seed"):
        if one.get(key) != two.get(key):
            raise InvalidInputError(
                f"{other.path} cannot be shown next to {reference.path}: {key} is {two.get(key)}, not {one.get(key)}"
            )


def images_of(artifact: Samples) -> Tensor:
    """Its images as one tensor ``[N, C, H, W]`` of bytes.

    Raises:
        InvalidInputError: it holds none.
    """
    from safetensors.torch import load_file

    images = load_file(artifact.images).get("images")
    if images is None or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in _MODES:
        raise InvalidInputError(f"{artifact.path} holds no images: make it again")
    return images


def _amplification(differences: list[Tensor]) -> int:
    """The power of two, up to 64, that makes differences well visible."""
    values = torch.cat([difference.flatten() for difference in differences] or [torch.zeros(1)]).float()
    place = max(1, round(_SHARE * len(values)))  # torch.quantile is limited in size
    bright = max(1.0, float(values.kthvalue(place).values))
    return int(min(64, 2 ** int(torch.tensor(255 / bright).log2().floor())))


def _tile(label: str, image: Tensor, alt: str) -> dict[str, Any]:
    """An image ``[C, H, W]`` as PNG, or as WebP where it has to be made smaller."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    mode = _MODES[pixels.shape[2]]
    picture = Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)
    stream, large = BytesIO(), max(picture.size) > LARGEST
    if large:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(stream, format="WEBP", quality=92)
    else:
        picture.save(stream, format="PNG", optimize=True)
    kind = "webp" if large else "png"
    uri = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    width, height = picture.size
    return {"label": label, "uri": uri, "alt": alt, "width": width, "height": height}
