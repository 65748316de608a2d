"""The verb ``lint``: a graph in, findings out; with fixes, a fixed graph too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from qdeploy.export.graph import LARGE, label, save
from qdeploy.export.graph.network import Network
from qdeploy.export.lint.fixes import fixes
from qdeploy.export.lint.forecast import forecast
from qdeploy.export.lint.options import parse_version, profile_of
from qdeploy.export.lint.report import Finding, LintReport
from qdeploy.export.lint.rule import SEVERITIES, E, Hit, Rule, rules
from qdeploy.export.lint.rules.graph import ELSEWHERE
from qdeploy.export.lint.scope import Scope
from qdeploy.export.lint.verdicts import ENGINES, TENSORRT, severity, verdict
from qdeploy.export.lint.waivers import WAIVERS
from qdeploy.recipe.targets import find_target
from qdeploy.store.artifact import Bundle, is_artifact, open_artifact
from qdeploy.store.files import explained_os_errors
from qdeploy.system.errors import InvalidInputError, QDeployError, UsageError
from qdeploy.system.suggest import unknown

_ROUNDS = 8  # a fix can make room for another; more than this many never happened


def lint(
    source: str | Path,
    *,
    target: str | None = None,
    engine: str = "tensorrt",
    tensorrt: str = "11.4",
    compute_capability: str | None = None,
    shapes: str | None = None,
    fix: str | Path | None = None,
) -> LintReport:
    """Check a graph against the rules of a target's engines.

    Args:
        source: an ONNX file, or an ONNX bundle, whose denoiser is meant.
        target: a name from `qdeploy.recipe.targets`; the rules of all its backends apply. By default the target of
            the bundle, and ``tensorrt`` for a file.
        engine: ``tensorrt`` or ``tensorrt-rtx``: whose verdicts the rules of TensorRT get.
        tensorrt: TensorRT's version; TensorRT for RTX has the parser of 11.
        compute_capability: of the GPU, as ``8.9``.
        shapes: smallest, optimal and largest shapes: ``sample:1x4x64x64,2x4x64x64,8x4x64x64;...``.
        fix: where to write the graph with every fix that does not change what it computes;
            the findings are then those of that graph.

    Raises:
        UsageError: an option makes no sense.
        InvalidInputError: the file is no ONNX graph, or its weights are not there.
    """
    if engine not in ENGINES:
        raise UsageError(unknown("engine", engine, ENGINES))
    target = target or _own_target(Path(source))
    find_target(target)
    scope = Scope(
        target,
        engine,
        parse_version(tensorrt, "--tensorrt") if engine == TENSORRT else Scope.tensorrt,
        parse_version(compute_capability, "--compute-capability") if compute_capability else None,
        profile_of(shapes) if shapes else {},
    )
    path = graph_file(Path(source))
    if elsewhere := _read_elsewhere(path, scope):
        if fix is not None:
            raise InvalidInputError(f"{path} has weights elsewhere: lint says where, without --fix")
        return LintReport(str(source), scope, elsewhere, {}, {})
    net = Network(path, scope.optimal)
    fixed: dict[str, int] = {}
    if fix is not None:
        output = Path(fix)
        if output.resolve() == path.resolve():
            raise UsageError(f"{output} is the graph itself: name another file for the fixed one")
        with _explained(net):
            before = find(net, scope)
            if any(finding.rule == "TRT036" and finding.severity == E for finding in before):
                raise InvalidInputError(
                    f"the weights of {path} are not whole: lint says where, without --fix"
                )
            fixed = apply_fixes(net.model, before, scope)
        _save(net.model, output)
        net = Network(output, scope.optimal)
    with _explained(net):
        findings, macs = find(net, scope), forecast(net).to_json()
    return LintReport(str(source), scope, findings, macs, fixed, str(fix) if fix is not None else None)


def find(net: Network, scope: Scope) -> tuple[Finding, ...]:
    """All findings, the worst first."""
    backends = find_target(scope.target).backends
    # Others' quantizers keep the metadata of a float export.
    precision = net.model.metadata_props.get("qdeploy.precision", "fp32")
    ours = net.model.producer_name == "qdeploy" and precision != "fp32"
    found = [
        _finding(rule, hit, held, scope.engine, WAIVERS.get(rule.id) if ours else None)
        for rule in rules().values()
        if rule.backend in backends
        for hit in rule.check(net, scope)
        if (held := severity(rule, hit, scope.engine))
    ]
    return tuple(sorted(found, key=lambda finding: list(SEVERITIES).index(finding.severity)))


def apply_fixes(model: ir.Model, findings: tuple[Finding, ...], scope: Scope) -> dict[str, int]:
    """Apply the fixes of what was found until they have nothing left to do.

    Returns:
        How many findings each fix was for, by rule; those that it could not fix exactly stay.
    """
    counts = Counter(finding.rule for finding in findings)
    used = []
    for _ in range(_ROUNDS):
        modified = False
        for rule, fix in fixes().items():
            if rule in counts and fix(scope)(model).modified:
                used.append(rule)
                modified = True
        Sequential(RemoveUnusedNodesPass(), TopologicalSortPass())(model)
        if not modified:
            break
    return {rule: counts[rule] for rule in sorted(set(used))}


def graph_file(source: Path) -> Path:
    """The ONNX file of a path: the file itself, or a bundle's denoiser.

    Raises:
        InvalidInputError: there is no such file.
    """
    if is_artifact(source):
        return open_artifact(source, Bundle).graph
    if not source.is_file():
        raise InvalidInputError(f"{source} is neither an ONNX file nor an ONNX bundle")
    return source


def _own_target(source: Path) -> str:
    """The target that a bundle was exported for; ``tensorrt`` for a file, or a bundle that does not name one."""
    if not is_artifact(source):
        return "tensorrt"
    return open_artifact(source, Bundle).facts.target


@contextmanager
def _explained(net: Network) -> Iterator[None]:
    """Rules rely on the ONNX standard: where one fails on a graph, the graph is invalid."""
    import onnx

    try:
        yield
    except QDeployError:
        raise
    except Exception as error:
        try:
            onnx.checker.check_model(str(net.path), full_check=True)
        except Exception as reason:  # the checker's errors have no common base
            first = str(reason).splitlines()[0]
            raise InvalidInputError(f"{net.path} is not valid ONNX: {first}") from error
        raise


def _save(model: ir.Model, output: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size <= LARGE:
        ir.external_data.load_to_model(model)  # else the new file would go on pointing at the old one's data
    with explained_os_errors(output):
        try:
            save(model, output)
        except InvalidInputError:
            output.unlink()
            raise


def _read_elsewhere(path: Path, scope: Scope) -> tuple[Finding, ...]:
    """Findings of the one rule that is asked before a graph is read; it looks at no more than the file."""
    rule = rules()[ELSEWHERE]
    unread: Any = SimpleNamespace(path=path)
    return tuple(_finding(rule, hit, rule.severity, scope.engine, None) for hit in rule.check(unread, scope))


def _finding(rule: Rule, hit: Hit, held: str, engine: str, waiver: str | None) -> Finding:
    where = hit.where
    if isinstance(where, ir.Node):
        where = label(where)
    elif isinstance(where, ir.Value):
        where = where.name
    evidence = verdict(rule, engine).evidence
    return Finding(rule.id, held, str(where), hit.message, rule.verified, waiver, evidence)
