"""The results of `benchmarks.verdicts` as a table."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

from qdeploy.evaluate.intervals import of_mean
from qdeploy.system.tables import Table

FIGURES = ("median", "pooled", "worst")


@dataclass(frozen=True)
class Claim:
    """One thing that a paper claims.

    Attributes:
        paper: the method.
        what: the thing.
        without: the recipe without it, in ``claims/``.
        with_it: the recipe with it.
    """

    paper: str
    what: str
    without: str
    with_it: str


CLAIMS = (
    Claim("Q-Diffusion", "split shortcuts, no learning, W4A8", "minmax-joint", "minmax-split"),
    Claim("Q-Diffusion", "split shortcuts, learned, W4A8", "qdiffusion-joint", "qdiffusion-split"),
    Claim("TFMQ-DM", "the time path on its own, all else alike", "time-in-units", "time-alone-rest-alike"),
    Claim("TFMQ-DM", "the method as a whole", "time-in-units", "time-on-its-own"),
    Claim("DGQ", "groups, W8A6", "dgq-none", "dgq-groups"),
    Claim("DGQ", "logarithmic softmax, W8A6", "dgq-none", "dgq-log"),
    Claim("DGQ", "logarithmic softmax and the start token, W8A6", "dgq-none", "dgq-log-start"),
    Claim("DGQ", "the method as a whole, W8A6", "dgq-none", "dgq-all"),
    Claim("QuEST", "tuning of time projections and attention, W4A8", "quest-untuned", "quest-tuned"),
    Claim("QNCD", "every embedding smoothed, W4A8", "qncd-plain", "qncd-smoothed"),
    Claim("all", "four-bit weights with a zero point, no learning", "minmax-split", "minmax-uint4"),
    Claim("all", "four-bit weights with a zero point, GPTQ", "gptq-int4", "gptq-uint4"),
    Claim("all", "four-bit weights with a zero point, AdaRound", "qdiffusion-split", "qdiffusion-uint4"),
    Claim("qdeploy", "the last unit tuned against the prediction, W4A8", "qdiffusion-split", "qdiffusion-end"),
)  # fmt: skip


def table(records: list[dict[str, Any]]) -> Table:
    """Each claim with its differences, mean and interval of 95 % over paired calibrations."""
    known = {(record["model"], record["recipe"], record["seed"]): record for record in records}
    head = [
        "model", "paper", "claim", "calibrations", "without: median / pooled / worst dB", "with it",
        "gain, median dB", "gain, pooled dB", "gain, worst dB",
    ]  # fmt: skip
    rows = []
    for model in dict.fromkeys(record["model"] for record in records):
        for claim in CLAIMS:
            pairs = [
                (known[model, claim.without, seed], known[model, claim.with_it, seed])
                for seed in sorted({record["seed"] for record in records})
                if (model, claim.without, seed) in known and (model, claim.with_it, seed) in known
            ]
            if pairs:
                gains = [
                    _interval([after[figure] - before[figure] for before, after in pairs])
                    for figure in FIGURES
                ]
                sides = [_means([pair[side] for pair in pairs]) for side in (0, 1)]
                rows.append([model, claim.paper, claim.what, str(len(pairs)), *sides, *gains])
    return Table(head, rows)


def _means(records: list[dict[str, Any]]) -> str:
    return " / ".join(f"{mean(record[figure] for record in records):.1f}" for figure in FIGURES)


def _interval(gains: list[float]) -> str:
    found = of_mean(gains)
    return f"{mean(gains):+.1f}" + (f" ± {(found[1] - found[0]) / 2:.1f}" if found else "")
