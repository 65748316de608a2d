"""Every name of TensorRT's that our sources use, looked up in the real module.

Run as a program beside the stand-in: it prints what it checked and what does not exist. Types are not inferred:
in `qdeploy.engines.tensorrt` a variable's or attribute's name tells the class, by the table below.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorrt
import tensorrt_rtx

# The last part of what stands before the dot -> the class; per file where the same word means other things.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "native": "IOptimizationProfile",
    "parser": "OnnxParser",
    "error": "ParserError",
    "runtime": "Runtime",
    "refitter": "Refitter",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "cache": "ITimingCache",
    "tensor": "ITensor",
    "settings": "IBuilderConfig",
}
FILES = {
    "builder.py": {"builder", "config", "network", "engine"},
    "execution.py": {"engine", "context"},
    "ports.py": {"engine"},
    "inspector.py": {"engine", "inspector"},
    "parser.py": {"parser", "network", "error", "tensor"},
    "plan.py": {"runtime", "engine", "refitter", "parser"},
    "profiles.py": {"builder", "config", "network", "native", "tensor"},
    "timing_cache.py": {"config", "cache"},
    "validity.py": {"runtime"},
    "gpu_targets.py": {"settings"},
    "runtime_cache.py": {"engine", "config", "cache"},
}
# What only TensorRT for RTX has is looked up there.
RTX_FILES = ("validity.py", "gpu_targets.py", "runtime_cache.py")
trt: Any = tensorrt
OTHER = {
    ("plan.py", "parser"): "OnnxParserRefitter",
    ("runtime_cache.py", "config"): "IRuntimeConfig",
    ("runtime_cache.py", "cache"): "IRuntimeCache",
}


def problems(folder: Path) -> tuple[list[str], list[str]]:
    """What was checked, and what is wrong."""
    checked: list[str] = []
    wrong: list[str] = []
    global trt
    for path in sorted(folder.rglob("*.py")):
        trt = tensorrt_rtx if path.name in RTX_FILES else tensorrt
        for node in ast.walk(ast.parse(path.read_text())):
            for what, found in _looked_up(path.name, node):
                checked.append(what)
                if found is not None:
                    wrong.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {what}: {found}")
    return checked, wrong


def _looked_up(file: str, node: ast.AST) -> Iterator[tuple[str, str | None]]:
    if isinstance(node, ast.Attribute):
        if (dotted := _dotted(node)) and dotted[0] == "trt" and dotted[1] != "__version__":
            yield ".".join(dotted), _missing(dotted[1:])
        elif owner := _class_of(file, node.value):
            yield (
                f"{owner}.{node.attr}",
                None if hasattr(getattr(trt, owner), node.attr) else "does not exist",
            )
    if isinstance(node, ast.Call):
        yield from _called(file, node)
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            dotted = _dotted(base)
            if dotted and dotted[0] == "trt":
                yield from _overridden(node, getattr(trt, dotted[1]))
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute) and (owner := _class_of(file, target.value)):
                prop = getattr(getattr(trt, owner), target.attr, None)
                writable = isinstance(prop, property) and prop.fset is not None
                yield f"{owner}.{target.attr} =", None if writable else "cannot be set"


def _dotted(node: ast.AST) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) and parts else []


def _missing(names: list[str]) -> str | None:
    thing: Any = trt
    for name in names:
        if not hasattr(thing, name):
            return f"{name!r} does not exist"
        thing = getattr(thing, name)
    return None


def _class_of(file: str, node: ast.AST) -> str | None:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return OTHER.get((file, name), CLASSES[name]) if name in FILES.get(file, ()) else None


def _called(file: str, node: ast.Call) -> Iterator[tuple[str, str | None]]:
    """The number of arguments and the keywords, against the signatures in the docstring."""
    function = node.func
    arguments, keywords = list(node.args), [keyword.arg for keyword in node.keywords]
    if isinstance(function, ast.Name) and function.id == "create":
        function, arguments, keywords = arguments[0], arguments[1:], []
    if isinstance(function, ast.Name) and function.id == "member":
        enum, name = (
            argument.value if isinstance(argument, ast.Constant) else None for argument in node.args[1:]
        )
        if name is not None:
            yield f"{enum}.{name}", _missing([enum, name])
        return
    if not isinstance(function, ast.Attribute):
        return
    dotted = _dotted(function)
    owner = _class_of(file, function.value)
    if dotted and dotted[0] == "trt" and isinstance(getattr(trt, dotted[-1], None), type):
        owner, name = dotted[-1], "__init__"
    elif owner:
        name = function.attr
    else:
        return
    method = getattr(getattr(trt, owner), name, None)
    signatures = _signatures(owner, name, method)
    if signatures is None:
        return
    fits = any(
        required - len(keywords) <= len(arguments) <= len(names) and set(keywords) <= set(names)
        for names, required in signatures
    )
    yield (
        f"{owner}.{name}({len(arguments)}{''.join(f', {k}=' for k in keywords)})",
        None if fits else "does not fit",
    )


def _signatures(owner: str, name: str, method: Any) -> list[tuple[list[str], int]] | None:
    """Names of the arguments after self, and how many are required, of every overload."""
    if not callable(method):
        return None
    found = []
    for text in re.findall(rf"{name}\(self: [^,)]*(?:, )?(.*)\) ->", method.__doc__ or ""):
        # A default such as <X.Y: 0> holds a colon; split at the commas that begin an argument.
        parts = [part for part in re.split(r", (?=\w+: )", text) if part]
        found.append(([part.split(":")[0] for part in parts], sum(" = " not in part for part in parts)))
    return found or None


def _overridden(node: ast.ClassDef, base: type) -> Iterator[tuple[str, str | None]]:
    """Methods that TensorRT calls: they must exist there, with as many arguments."""
    for function in node.body:
        if not isinstance(function, ast.FunctionDef) or function.name in ("__init__", "close"):
            continue
        name = f"{base.__name__}.{function.name}"
        signatures = _signatures(base.__name__, function.name, getattr(base, function.name, None))
        taken = len(function.args.args) - 1
        fits = signatures is not None and any(len(names) == taken for names, _ in signatures)
        yield f"{name} overridden with {taken}", None if fits else "is not what TensorRT calls"


def tables(package: Path) -> tuple[list[str], list[str]]:
    """Names that stand in our tables as text."""
    sys.path.insert(0, str(package))
    from qdeploy.engines.tensorrt.builder import FLAGS
    from qdeploy.engines.tensorrt.dtypes import TORCH_NAMES

    pairs = [("BuilderFlag", name) for name in FLAGS.values()] + [("DataType", name) for name in TORCH_NAMES]
    missing = [
        f"{enum}.{name} does not exist" for enum, name in pairs if not hasattr(getattr(trt, enum), name)
    ]
    return [f"{enum}.{name}" for enum, name in pairs], missing


if __name__ == "__main__":
    root = Path(sys.argv[1])
    checked, wrong = problems(root / "qdeploy" / "engines" / "tensorrt")
    trt = tensorrt
    more, missing = tables(root)
    assert inspect.ismodule(trt)
    print(
        json.dumps(
            {"checked": sorted(set(checked + more)), "uses": len(checked + more), "wrong": wrong + missing}
        )
    )
