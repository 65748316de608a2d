"""Which preset for which model, processor and wish: a table with what was measured, and a search in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown

MODELS = {
    "unet": "unet u-net sd sd15 sd1.5 sdxl ddpm ldm stable-diffusion",
    "transformer": "transformer dit pixart flux sd3 wan",
}
PROCESSORS = {
    "cpu": "cpu vnni amx openvino",
    "avx2": "avx2",
    "tensorrt": "tensorrt gpu nvidia",
    "rtx": "rtx tensorrt-rtx geforce",
}
WISHES = {
    "speed": "speed fast fastest latency",
    "size": "size small smallest memory",
    "quality": "quality best accurate",
    "4-bit": "4-bit 4bit w4 int4",
    "8-bit": "8-bit 8bit w8 int8",
}


@dataclass(frozen=True)
class Advice:
    """One row of the table.

    Attributes:
        preset: its name.
        options: further options of ``calibrate``.
        models: ``unet``, ``transformer``.
        processors: ``cpu`` (with VNNI or AMX), ``avx2`` (without), ``tensorrt``, ``rtx``.
        wishes: ``speed``, ``size``, ``quality``, ``4-bit``, ``8-bit``.
        why: what it gives, in one sentence.
        measured: means over the calibrations of a results file: ``model``, ``run``, ``sqnr`` and ``psnr`` in dB.
        few_bits: means over three calibrations: ``model``, ``recipe`` and ``sqnr`` in dB.
        blocks: sizes in MB and SQNR in dB of weights in blocks on ``digits-dit``.
        more: the page with further numbers.
    """

    preset: str
    models: tuple[str, ...]
    processors: tuple[str, ...]
    wishes: tuple[str, ...]
    why: str
    options: tuple[str, ...] = ()
    measured: tuple[Mapping[str, Any], ...] = ()
    few_bits: tuple[Mapping[str, Any], ...] = ()
    blocks: Mapping[str, float] | None = None
    more: str = ""

    @property
    def evidence(self) -> str:
        """What was measured, in a line."""
        lines = [
            f"{each['model']}, {each['run']}: SQNR {each['sqnr']:.1f} dB, PSNR {each['psnr']:.1f} dB"
            for each in self.measured
        ]
        lines += [f"{each['model']}, {each['recipe']}: SQNR {each['sqnr']:.1f} dB" for each in self.few_bits]
        if self.blocks:
            lines.append(
                f"digits-dit: {self.blocks['disk_mb']:.1f} MB instead of {self.blocks['float_mb']:.1f}, "
                f"SQNR {self.blocks['sqnr']:.1f} dB"
            )
        return "; ".join([*lines, *([f"see {self.more}"] if self.more else [])])

    @property
    def command(self) -> str:
        """The options of ``calibrate`` that choose it."""
        return " ".join(["-r", self.preset, *self.options])


@cache
def choices() -> tuple[Advice, ...]:
    """All rows of the table, the first recommended first."""
    from qdeploy.store.bounded_yaml import read_yaml

    return tuple(_choice(row) for row in read_yaml(Path(__file__).with_name("which.yaml")))


def _choice(row: Mapping[str, Any]) -> Advice:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
    }
    return Advice(**values)


def which(question: str) -> list[Advice]:
    """The presets that fit a few words.

    Args:
        question: words such as ``"DiT 4-bit CPU"``: a kind of model, a processor, wishes; in any order, each
            may be left out.

    Raises:
        UsageError: there is no word, or an unknown one, or nothing fits all of them.
    """
    asked = list(_meanings(question))
    if not asked:
        raise UsageError("--which takes a few words, as in 'unet cpu fast'")
    found = [choice for choice in choices() if all(_fits(choice, *each) for each in asked)]
    if not found:
        words = " and ".join(word for _, word in asked)
        raise UsageError(f"no preset is measured or meant for {words}: leave one of the words out")
    return found


def _fits(choice: Advice, kind: str, word: str) -> bool:
    return word in getattr(choice, kind)


def _meanings(question: str) -> Iterator[tuple[str, str]]:
    known = {
        spelling: (kind, word)
        for kind, table in (("models", MODELS), ("processors", PROCESSORS), ("wishes", WISHES))
        for word, spellings in table.items()
        for spelling in spellings.split()
    }
    text = re.sub(r"\b([48])[ -]bits?\b", r"\1-bit", question.lower())
    for spelling in re.findall(r"[^\s,;?]+", text):
        if spelling not in known:
            raise UsageError(unknown("word", spelling, known))
        yield known[spelling]
