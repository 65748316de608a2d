"""The severity of a rule for each TensorRT, which differ in what they accept.

The severity that stands with a rule is that of TensorRT 11. TensorRT for RTX shares the ONNX parser, but its
compiler, Myelin, fuses more and refuses other things. Its verdicts were run: the smallest graph that breaks each rule
went through the builder of version 1.7.1, for SM89 or SM120 (`benchmarks/lint_against_builder.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.export.lint.rule import E, Hit, Rule, W

RUN, READ, INFERRED = "run", "read", "inferred"
TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
ENGINES = (TENSORRT, RTX)


@dataclass(frozen=True)
class Verdict:
    """An engine's word on a rule.

    Attributes:
        severity: of the rule's findings; empty where the rule does not hold for the engine.
        evidence: `RUN` in the engine's builder, `READ` in documentation or sources, or `INFERRED`.
        note: what the engine does, where it differs from the rule's own words.
    """

    severity: str
    evidence: str
    note: str = ""


def _fuses(note: str = "the same kernels with and without") -> Verdict:
    return Verdict("", RUN, note)


# Rules that are not listed have their own severity, by inference.
_RTX: dict[str, Verdict] = {
    **{id: Verdict(E, RUN) for id in ("TRT001", "TRT006", "TRT009", "TRT012")},
    **{id: Verdict(E, RUN) for id in ("TRT018", "TRT019", "TRT035", "TRT036", "TRT037")},
    "TRT002": Verdict(
        E, RUN, "UINT8 with zero point 0 builds: it is read as INT8, and codes above 127 are clipped"
    ),
    "TRT004": Verdict(E, RUN, "16-bit subnormals build"),
    "TRT005": Verdict(E, RUN, "the builder crashes (SIGSEGV)"),
    "TRT007": Verdict(W, RUN, "builds; the convolution computes in floats"),
    "TRT008": Verdict(W, RUN),
    "TRT010": _fuses("builds, and multiplies int8"),
    "TRT011": _fuses("the same int8 kernel"),
    "TRT013": Verdict(E, INFERRED, "builds without a word; its numbers are unknown"),
    "TRT014": _fuses("blocks of 32 fuse too"),
    "TRT015": Verdict(E, RUN, "a convolution of int4 codes with int8 inputs is refused"),
    "TRT017": Verdict(E, INFERRED, "run on a Q, where it has no effect"),
    "TRT020": _fuses("importers are found by the operator's name alone"),
    "TRT021": Verdict(W, RUN, "builds; float64 is computed in float32"),
    "TRT022": Verdict(W, RUN),
    "TRT023": _fuses("int8 with a Pad or Cast between too"),
    "TRT026": Verdict(W, RUN, "int8 attention of any size is split into kernels"),
    "TRT027": Verdict(W, RUN, "whole fp8 attention fuses with any head; a part of it never does"),
    "TRT028": _fuses("the Add is one pointwise kernel either way"),
    "TRT029": _fuses("one pointwise kernel"),
    "TRT031": Verdict(W, RUN, "one more kernel"),
    **{id: _fuses() for id in ("TRT033", "TRT034", "TRT038", "TRT039", "TRT040", "TRT044")},
    "TRT047": Verdict(
        E, RUN, "int8 inputs: refused, or built with the block scales behind the sum; fp8: refused"
    ),
}


def verdict(rule: Rule, engine: str) -> Verdict:
    """What an engine makes of a rule."""
    if engine == RTX and rule.id in _RTX:
        return _RTX[rule.id]
    evidence = RUN if rule.verified else INFERRED if engine == RTX or "INF" in rule.source else READ
    return Verdict(rule.severity, evidence)


def severity(rule: Rule, hit: Hit, engine: str) -> str:
    """The severity of a finding; empty where the rule does not hold for the engine."""
    found = verdict(rule, engine).severity
    return hit.severity or found if found else ""
