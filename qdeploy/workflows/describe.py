"""What `inspect` found and what words mean, as text for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

_WIDTH = 100
_BEST = 10  # tensors that are named
_FEW = 6  # entries of a list, or files, that are named
_HEAD = ("kind", "description", "path", "schema", "version", "sha256", "valid", "problem", "size_mb")
_ELSEWHERE = (*_HEAD, "files", "recipe", "timestep_gain", "seed", "notes")


def description(result: Mapping[str, Any]) -> str:
    """The result of `inspect` for people: what it is, whether it is intact, its facts; of long lists the start."""
    state = "intact" if result["valid"] else f"DAMAGED: {result['problem']}"
    lines = [f"{result['kind']}  {result['path']}  {result['size_mb']:.1f} MB  {state}"]
    lines += [result["description"]] if "description" in result else []
    lines += [f"sha256 {result['sha256']}"]
    plain = {name: value for name, value in result.items() if name not in _ELSEWHERE}
    facts = plain.pop("facts", {})
    nested = {name: value for name, value in plain.items() if isinstance(value, Mapping)}
    lines += _section(
        "", {name: value for name, value in plain.items() if name not in nested} | facts | _seed(result)
    )
    if result.get("recipe"):
        lines += ["", "recipe", *_recipe(result["recipe"])]
    for name, values in (nested | {"notes": result.get("notes") or {}}).items():
        lines += _section(name.replace("_", " "), values)
    if "timestep_gain" in result:
        gain = dict(result["timestep_gain"])
        tensors = gain.pop("by_tensor_db")
        best = dict(list(tensors.items())[:_BEST])
        lines += _section("timestep gain", gain)
        lines += _section(f"best {len(best)} of {len(tensors)} tensors, dB", best, verbatim=True)
    if files := result.get("files"):
        largest = sorted(files, key=lambda name: -files[name])[:_FEW]
        left = len(files) - len(largest)
        sizes = {name: f"{files[name] / 2**20:.2f} MB" for name in largest}
        lines += _section("files", sizes | ({"others": str(left)} if left else {}), verbatim=True)
    return "\n".join(lines)


def _seed(result: Mapping[str, Any]) -> dict[str, Any]:
    return {} if result.get("seed") is None else {"seed": result["seed"]}


def _recipe(recipe: Mapping[str, Any]) -> Iterator[str]:
    words = {name: value for name, value in recipe.items() if name not in ("stages", "exclude")}
    yield from _wrapped(", ".join(f"{name} {short(value)}" for name, value in words.items()), "  ")
    if recipe.get("exclude"):
        yield from _wrapped(f"exclude {short(recipe['exclude'])}", "  ")
    for number, stage in enumerate(recipe.get("stages", ()), 1):
        for name, options in stage.items() if isinstance(stage, Mapping) else ((stage, {}),):
            yield from _wrapped(
                f"{number}  {name}" + (f": {short(options)}" if options else ""), "  ", "     "
            )


def _section(title: str, values: Mapping[str, Any], verbatim: bool = False) -> list[str]:
    shown = {name: value for name, value in values.items() if value not in (None, {}, [])}
    if not shown:
        return []
    width = max(len(name) for name in shown)
    indent = "  " if title else ""
    lines = ["", *([title] if title else [])]
    for name, value in shown.items():
        written = name if verbatim else name.replace("_", " ")
        start = f"{indent}{written:{width}}  "
        lines += _wrapped(short(value), start, " " * len(start))
    return lines


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    return wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=first if rest is None else rest, break_on_hyphens=False
    )  # fmt: skip


def short(value: Any) -> str:
    """A value in a few words: mappings as ``name value`` pairs, of a long list the start and its length."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {_inner(item)}" for name, item in value.items() if item not in (None, {}, [])
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(_inner(item) for item in value[:_FEW])
        return shown if len(value) <= _FEW else f"{shown}, ... ({len(value)} in all)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inner(value: Any) -> str:
    nested = isinstance(value, Mapping | list | tuple)
    return f"({short(value)})" if nested else short(value)


def explanation(result: Mapping[str, Any]) -> str:
    """The result of `qdeploy.workflows.inspect.explain` for people."""
    plain = {
        name: value for name, value in result.items() if name not in ("name", "kind", "recipe", "stages")
    }
    lines = [f"{result['kind']} {result['name']}", *_section("", plain)[1:]]
    stages = result.get("stages")
    recipe = result.get("recipe") or ({"stages": stages} if stages else None)
    return "\n".join([*lines, *(["", *([] if stages else ["recipe"]), *_recipe(recipe)] if recipe else [])])


def overview(words: Mapping[str, Any]) -> str:
    """The result of `qdeploy.workflows.inspect.methods` for people: a line on each preset, names of the rest."""
    lines: list[str] = []
    for group in ("presets", "methods", "targets", "efforts", "coverages"):
        lines += [group, *_entries(words[group]), ""]
    for group in ("stages", "formats", "metrics", "passes"):
        if not words[group]:
            continue
        lines += [group, *_wrapped(", ".join(words[group]), "  "), ""]
    return "\n".join(
        [*lines, "qdeploy methods NAME explains one of them, qdeploy methods --which 'dit cpu 4-bit' chooses"]
    )


def _entries(entries: Mapping[str, Any]) -> Iterator[str]:
    width = max(len(name) for name in entries)
    for name, entry in entries.items():
        start = f"  {name:{width}}  "
        text = entry if isinstance(entry, str) else f"{entry['description']} ({entry['paper']})"
        yield from _wrapped(text, start, " " * len(start))
