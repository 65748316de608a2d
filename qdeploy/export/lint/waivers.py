"""Rules that are waived for qdeploy's own exports, each with its reason.

A waiver holds for graphs that qdeploy exported. Its findings are shown, and not counted.
"""

from __future__ import annotations

WAIVERS = {
    "TRT028": (
        "the skipped branch of a residual Add has no calibrated scale, and rounding it without one would "
        "change what was calibrated; the Add computes in floats"
    ),
}
