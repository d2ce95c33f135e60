"""The house in numbers: lengths of lines, public names, how far a time travels.

`python nbs/book.py measure` prints them for the files as they are now, and with the
name of a git revision for that revision, so that a change can be seen.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import house

ROOT = Path(__file__).resolve().parent.parent
TRIED_ENTRY = "a_path_of_my_own"

# Prints the digest of every notebook, by the functions of the tree that it runs in.
DIGESTS = """
import sys; sys.path.insert(0, "nbs")
import book, json
found = {}
for path in book.notebooks():
    notebook = book.read(path)
    cells = book.sources(notebook) if hasattr(book, "sources") else notebook
    found[path.name] = book.digest(cells)
print(json.dumps(found))
"""

# Counts the calls of functions of the package to which a training step hands a time.
JOURNEY = """
import json, sys
import torch
from soflow_edu.config import make_config
from soflow_edu.distributions import law_of
from soflow_edu.flow_matching import Batch
from soflow_edu.training import assemble

torch.set_num_threads(1)
law = law_of("eight_gaussians")
generator = torch.Generator().manual_seed(0)
batch = Batch(law.sample(256, generator)[0])
model, objective = assemble(make_config({"objective": "soflow", "steps": 1}))
seen = []

def tensors(value):
    if torch.is_tensor(value):
        return [value]
    return [part for part in vars(value).values() if torch.is_tensor(part)]

def watch(frame, event, _):
    code = frame.f_code
    if event == "call" and "soflow_edu" in code.co_filename:
        names = code.co_varnames[: code.co_argcount]
        given = [frame.f_locals[name] for name in names if name in frame.f_locals]
        held = [v for v in given if torch.is_tensor(v) or type(v).__name__ in CARRIERS]
        found = []
        for value in held:
            found += tensors(value)
        seen.append((code.co_filename, code.co_name, code.co_firstlineno, found))

CARRIERS = ("Draws", "Rows")
sys.setprofile(watch)
draws = objective.draw(batch, 0.5, generator)
loss = objective.loss(model, batch, draws, 0.5)
sys.setprofile(None)
times = torch.cat([draws.t, draws.s, draws.l]).double()

def is_time(tensor):
    small = tensor.is_floating_point() and 0 < tensor.numel() <= len(draws.t)
    return small and bool(torch.isin(tensor.detach().double(), times).all())

passed = [call[:3] for call in seen if any(is_time(part) for part in call[3])]
modules = {call[0] for call in passed}
print(json.dumps([len(passed), len(set(passed)), len(modules)]))
"""


def run_in(tree: Path, code: str):
    "What a piece of Python prints, as JSON, when it runs in a tree of the project."
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def copy_of(revision: str, folder: Path) -> Path:
    "The tracked files, as they are now or at a git revision, in a folder."
    name = revision or "HEAD"
    if not revision:
        stash = ["git", "stash", "create"]
        made = subprocess.run(stash, cwd=ROOT, capture_output=True, text=True)
        name = made.stdout.strip() or "HEAD"
    archive = [
        "git",
        "archive",
        "--format=tar",
        f"--output={folder / 'tree.tar'}",
        name,
    ]
    subprocess.run(archive, cwd=ROOT, check=True)
    tree = folder / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xf", folder / "tree.tar", "-C", tree], check=True)
    return tree


# ------------------------------------------------------------------------- counts
def package_files(tree: Path) -> list[Path]:
    files = sorted((tree / "soflow_edu").glob("*.py"))
    return [path for path in files if path.name != "_modidx.py"]


def own_lines(path: Path) -> list[str]:
    "The lines of a module, without those that nbdev writes."
    source = path.read_text(encoding="utf-8")
    found = []
    generated = False
    for line in source.splitlines():
        generated = line.startswith("__all__") or (generated and line.startswith(" "))
        if line.strip() and not generated and not line.startswith("# %%"):
            found.append(line)
    return found


def line_lengths(tree: Path) -> dict[str, str]:
    lengths = []
    for path in package_files(tree):
        lengths += [len(line) for line in own_lines(path)]
    long = sum(length > house.CODE_WIDTH for length in lengths)
    very_long = sum(length > 120 for length in lengths)
    return {
        "lines of the package": f"{len(lengths):,}",
        f"  over {house.CODE_WIDTH} columns": f"{100 * long / len(lengths):.1f} %",
        "  over 120 columns": f"{100 * very_long / len(lengths):.1f} %",
        "  the longest": f"{max(lengths)}",
    }


def broken(tree: Path) -> dict[str, str]:
    "How often each rule is broken in the code cells of the notebooks."
    rules = Counter()
    for path in sorted((tree / "nbs").rglob("*.ipynb")):
        for cell in house.cells_of(path, tree):
            rules.update(finding.rule for finding in house.broken_rules(cell))
    return {rule: f"{rules[rule]:,}" for rule in house.RULES}


def public_names(tree: Path) -> dict[str, str]:
    homes = house.public_names(tree / "soflow_edu")
    twice = sum(len(modules) > 1 for modules in homes.values())
    files = [path for path in package_files(tree) if not path.stem.startswith("__")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    documented = sum(bool(house.docstring_of(tree)) for tree in trees)
    return {
        "public names": f"{len(homes):,}",
        "  in two modules": f"{twice}",
        "modules with a docstring": f"{documented} of {len(files)}",
    }


def checked_definitions(tree: Path) -> dict[str, str]:
    results = []
    longest = 0
    for path in sorted((tree / "nbs").rglob("*.ipynb")):
        cells = house.cells_of(path, tree)
        results += house.followed(cells)
        longest = max(longest, house.longest_run(cells))
    share = 100 * sum(results) / len(results)
    return {
        "exported definitions": f"{len(results):,}",
        "  followed at once by a check": f"{share:.0f} %",
        "  most in a row without one": f"{longest}",
    }


def stale_notebooks(tree: Path) -> dict[str, str]:
    "How many digests change if one entry is added to the catalogue."
    before = run_in(tree, DIGESTS)
    catalogue = tree / "soflow_edu" / "catalogue.json"
    if catalogue.exists():
        content = json.loads(catalogue.read_text(encoding="utf-8"))
        content["path"][TRIED_ENTRY] = "paths"
        catalogue.write_text(json.dumps(content), encoding="utf-8")
    else:
        config = tree / "soflow_edu" / "config.py"
        text = config.read_text(encoding="utf-8")
        entry = f'"path": {{"{TRIED_ENTRY}": "paths", '
        config.write_text(text.replace('"path": {', entry, 1), encoding="utf-8")
    after = run_in(tree, DIGESTS)
    changed = sum(after[name] != digest for name, digest in before.items())
    return {"stale notebooks after one new entry": f"{changed} of {len(before)}"}


def journey(tree: Path) -> dict[str, str]:
    calls, functions, modules = run_in(tree, JOURNEY)
    return {
        "calls that a time passes in a step": f"{calls}",
        "  functions": f"{functions}",
        "  modules": f"{modules}",
    }


def report(revision: str = "") -> str:
    "The numbers of the house, a line each."
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(revision, Path(folder))
        parts = [line_lengths, broken, public_names, checked_definitions, journey]
        rows = {}
        for part in [*parts, stale_notebooks]:  # which changes the tree: last
            rows |= part(tree)
    return "\n".join(f"{name:56s} {value:>10s}" for name, value in rows.items())
