"""Every lint rule's smallest failing graph and its twin through the real builder of TensorRT for RTX.

    python -m benchmarks.lint_against_builder -o benchmarks/results/lint-against-builder.json

No GPU is needed. A disagreement is a rule that calls an error what builds and computes what it should, or that is
silent where the builder refuses or crashes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.verify import verify
from qdeploy.export.lint.rule import rules
from qdeploy.export.lint.run import lint
from qdeploy.export.lint.verdicts import RTX, verdict
from qdeploy.store.files import write_json
from qdeploy.system.errors import QDeployError
from tests.export.lint.fixtures import CASES


def run(rule: str, which: str) -> dict[str, Any]:
    """What the rules and the builder say of one graph."""
    case = CASES[rule]
    with tempfile.TemporaryDirectory() as scratch:
        path = case.write(getattr(case, which), Path(scratch) / "model.onnx")
        report = lint(path, engine=RTX, **case.options)
        errors = sorted({finding.rule for finding in report.findings if finding.severity == "E"})
        row: dict[str, Any] = {"lint": report.counts, "errors": errors}
        try:
            found = verify(path, shapes=case.options.get("shapes"), minutes=5)
        except QDeployError as error:  # our own check came first
            return row | {"built": None, "reason": str(error)}
        return row | {
            "built": found.built,
            "reason": found.reason,
            "kernels": found.kernels,
            "products": list(found.products),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    output = parser.parse_args().output
    table: dict[str, Any] = {}
    for name, rule in rules().items():
        if not name.startswith("TRT"):
            continue
        held = verdict(rule, RTX)
        table[name] = {"verdict": held.severity, "evidence": held.evidence}
        for which in ("failing", "twin"):
            table[name][which] = run(name, which)
        agrees = (table[name]["failing"]["built"] is not True) == bool(table[name]["failing"]["errors"])
        table[name]["agrees"] = agrees and table[name]["twin"]["built"] is not False
        print(
            name,
            table[name]["verdict"] or "-",
            "agrees" if table[name]["agrees"] else "DISAGREES",
            flush=True,
        )
        write_json(output, table)


if __name__ == "__main__":
    main()
