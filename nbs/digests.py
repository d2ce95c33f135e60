"""The digest of a notebook: a hash of its code and of all code that it leads to.

Stored outputs can be trusted as long as the digest is what it was when they were made.
It covers the code cells, every module of soflow_edu that they import, directly or
through another module, the modules of the components that they name (the catalogue says
where these live), and the configurations that they read. It does not cover the
catalogue itself: a new component changes only the digests of what names it.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "soflow_edu"
# Code that holds one of these words reads configurations ...
READS = ("load_config", "soflow demo", "soflow_edu.cli", "main([")
# ... and with one of these it may read any of them.
LISTS = (
    "soflow demo",
    "soflow_edu.cli",
    "main([",
    "shipped_configs",
    "rungs",
    "ladder_table",
    "verdict(",
)


@cache
def parsed(code: str) -> ast.Module:
    "The syntax tree of code, without the lines that only IPython understands."
    lines = code.splitlines()
    plain = [line for line in lines if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(plain))


def module_text(name: str) -> str:
    return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists()


# ------------------------------------------------------------------- what code imports
@cache
def imported(code: str) -> set[str]:
    "Names of the modules of soflow_edu that a piece of code imports."
    found = set()
    fronts = set()  # what the package itself is called
    for node in ast.walk(parsed(code)):
        if isinstance(node, ast.ImportFrom):
            found |= imported_from(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                _, dot, module = alias.name.partition("soflow_edu.")
                if dot:
                    found.add(module)
                elif alias.name == "soflow_edu":
                    fronts.add(alias.asname or alias.name)
    return found | used_of(code, fronts)


def used_of(code: str, fronts: set[str]) -> set[str]:
    "The modules behind the names that code takes from the package itself."
    found = set()
    for node in ast.walk(parsed(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in fronts:
            found.add(home_of(node.attr))
    return found - {""}


def imported_from(node: ast.ImportFrom) -> set[str]:
    "The modules that one `from ... import ...` names."
    source = node.module or ""
    if node.level == 1 and source:
        return {source}
    if source.startswith("soflow_edu."):
        return {source.removeprefix("soflow_edu.")}
    if node.level == 1 or source == "soflow_edu":
        return {home_of(alias.name) for alias in node.names} - {""}
    return set()


def home_of(name: str) -> str:
    "The module behind a name of `soflow_edu` itself: a module, or where it is defined."
    if is_module(name):
        return name
    front = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    homes = re.findall(r'^    "(\w+)": "(\w+)",$', front, re.M)
    return dict(homes).get(name, "")


# ----------------------------------------------------------------- what code builds
def catalogue() -> dict[str, dict[str, str]]:
    path = PACKAGE / "catalogue.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def words(code: str) -> set[str]:
    "All texts that code holds."
    constants = [n for n in ast.walk(parsed(code)) if isinstance(n, ast.Constant)]
    return {node.value for node in constants if isinstance(node.value, str)}


def texts(content: Any) -> set[str]:
    "All texts in what a YAML file holds, but for keys."
    if isinstance(content, str):
        return {content}
    if isinstance(content, dict):
        content = content.values()
    elif not hasattr(content, "__iter__"):
        return set()
    found = set()
    for part in content:
        found |= texts(part)
    return found


def parts_of_runs() -> dict[str, dict[str, str]]:
    """The catalogue without readers: only files of other projects are read by them, and
    a notebook that has such a file imports the module of its reader."""
    return {kind: catalogue()[kind] for kind in catalogue() if kind != "reader"}


def built(code: str) -> set[str]:
    "Modules of the components that code names, itself or through a configuration."
    named = words(code) | texts(yaml.safe_load_all(configurations(code)))
    found = set()
    for entries in parts_of_runs().values():
        found |= {entries[name] for name in entries if name in named}
    return {name for name in found if is_module(name)}


def listed(code: str) -> str:
    "The parts of the catalogue of which code lists all names."
    kinds = set()
    for node in calls(code):
        if getattr(node.func, "id", "") == "names" and node.args:
            kinds |= words(ast.unparse(node.args[0]))
    return json.dumps({kind: catalogue().get(kind) for kind in sorted(kinds)})


def calls(code: str) -> Iterator[ast.Call]:
    for node in ast.walk(parsed(code)):
        if isinstance(node, ast.Call):
            yield node


# ------------------------------------------------------------- what code configures
def configurations(code: str) -> str:
    "The shipped configurations that code reads: those that it names, or all."
    if not any(word in code for word in READS):
        return ""
    named = set()
    every = any(word in code for word in LISTS)
    for node in calls(code):
        if getattr(node.func, "id", "") == "load_config":
            constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
            every = every or not constant
            named |= words(ast.unparse(node))
    every = every or not named
    chosen = []
    for path in sorted((PACKAGE / "configs").glob("*.yaml")):
        if every or path.stem in named:
            chosen.append(path.read_text(encoding="utf-8"))
    return "\n---\n".join(chosen)


# ------------------------------------------------------------------------- the digest
def reached(modules: set[str]) -> dict[str, str]:
    "The texts of modules, and of all that they import."
    waiting = set(modules)
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        found[name] = module_text(name)
        waiting |= imported(found[name]) | fixed_parts(found[name])
        waiting -= found.keys()
    return found


def fixed_parts(code: str) -> set[str]:
    "Modules of the components that a module names together with their kind."
    named = words(code)
    found = set()
    for kind, entries in parts_of_runs().items():
        if kind in named:
            found |= {entries[name] for name in entries if name in named}
    return {name for name in found if is_module(name)}


def essence(text: str) -> str:
    "Code without the comments in which nbdev names a cell, and without empty lines."
    text = re.sub(r"^# %% .*$", "", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n", text)


def digest(sources: list[str]) -> str:  # the code cells of a notebook
    "The digest of a notebook with these code cells."
    code = "\n\n".join(sources)
    run = "\n\n".join(part for part in sources if not part.startswith("#| export"))
    modules = reached(imported(code) | built(run))
    parts = [code, *(modules[name] for name in sorted(modules))]
    parts += [configurations(run), listed(run)]
    text = "\0".join(essence(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
