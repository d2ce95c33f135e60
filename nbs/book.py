"""Keeps the book: exports and checks the notebooks, executes them, writes README.md.

python nbs/book.py export          notebooks -> soflow_edu/ and its catalogue
python nbs/book.py check           exit 1 if the package is not what they export
python nbs/book.py run [NAME ...]  execute all notebooks, or those whose path holds a
                                   NAME, and store their outputs
python nbs/book.py readme          nbs/index.ipynb -> README.md and nbs/pictures/
python nbs/book.py links           links to Colab and Binder into each chapter, or
                                   out of it if settings.ini names no git_url
python nbs/book.py style [NAME ..] places that break the rules of the house
python nbs/book.py measure [REV]   the house in numbers, now or at a git revision
"""

import base64
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from configparser import ConfigParser
from pathlib import Path

import equations
import house
import measures
from digests import digest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
PACKAGE = ROOT / "soflow_edu"
PICTURES = NOTEBOOKS / "pictures"
# Every other module is exported from a notebook.
WRITTEN_BY_HAND = {"__init__.py", "__main__.py"}
CELL_LIMIT = 900  # seconds a cell may take where other work goes on beside it


def notebooks() -> list[Path]:
    "All notebooks in reading order: the index, then the chapters."
    found = []
    for path in NOTEBOOKS.rglob("*.ipynb"):
        parts = path.relative_to(NOTEBOOKS).parts
        if not any(part.startswith((".", "_")) for part in parts):
            found.append(path)
    return sorted(found, key=lambda path: (path.parent != NOTEBOOKS, str(path)))


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook) -> list:
    "Without the cell that installs the package where a chapter is opened alone."
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        cell for cell in cells if cell.source.strip() and "install" not in tags(cell)
    ]


def sources(notebook) -> list[str]:
    return [cell.source for cell in code_cells(notebook)]


# -------------------------------------------------------------------- export and check
def modules(root: Path) -> list[str]:
    "The modules that the notebooks below root/nbs export, in reading order."
    found = []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        found += re.findall(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8"))
    return found


# Run in a process of its own: each new name belongs to the module just imported.
COLLECT = """
import json, sys
from importlib import import_module
from soflow_edu import core
core.catalogue = dict
found = {}
for module in sys.argv[2:]:
    before = set(core._registered)
    import_module(f"soflow_edu.{module}")
    for kind, name in core._registered.keys() - before:
        found.setdefault(kind, {})[name] = module
text = json.dumps(found, indent=1, sort_keys=True)
open(sys.argv[1], "w", encoding="utf-8").write(text + chr(10))
"""


def write_catalogue(root: Path):
    "Collects what the modules of root/soflow_edu register into its catalogue."
    target = root / "soflow_edu" / "catalogue.json"
    command = [sys.executable, "-c", COLLECT, target, *modules(root)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=environment, check=True)


def finish_module(path: Path):
    """Breaks the docstring of a module, which nbdev writes as one line, and makes all
    imports of the package relative, which it does for those of one line only."""
    first, rest = path.read_text(encoding="utf-8").split("\n", 1)
    if first.startswith('"""'):
        first = textwrap.fill(first, house.CODE_WIDTH, break_on_hyphens=False)
    rest = re.sub(r"^from soflow_edu\.", "from .", rest, flags=re.M)
    path.write_text(f"{first}\n{rest}", encoding="utf-8")


def export(root: Path = ROOT):
    "Exports the notebooks below root/nbs; modules that none exports are removed."
    command = Path(sys.executable).with_name("nbdev-export")
    subprocess.run([command], cwd=root, check=True, stdout=subprocess.DEVNULL)
    wanted = {f"{name}.py" for name in modules(root)} | WRITTEN_BY_HAND
    for module in (root / "soflow_edu").glob("*.py"):
        if module.name not in wanted:  # nbdev's own index among them
            module.unlink()
        elif module.name not in WRITTEN_BY_HAND:
            finish_module(module)
    ruff = Path(sys.executable).with_name("ruff")
    sort = ["check", "--fix", "--exit-zero", "--silent", "--select", "I"]
    for words in (sort, ["format", "--quiet"]):
        subprocess.run([ruff, *words, "soflow_edu"], cwd=root, check=True)
    write_catalogue(root)


def differences() -> list[str]:
    "Names of files that are not what the notebooks export, found by exporting a copy."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        unwanted = shutil.ignore_patterns(".*", "__pycache__", "kernel-*")
        shutil.copytree(NOTEBOOKS, copy / "nbs", ignore=unwanted)
        shutil.copy(ROOT / "pyproject.toml", copy)
        fresh = copy / "soflow_edu"
        exported = shutil.ignore_patterns("*.py", "catalogue.json", "__pycache__")
        shutil.copytree(PACKAGE, fresh, ignore=exported)
        for name in WRITTEN_BY_HAND:
            shutil.copy(PACKAGE / name, fresh)
        export(copy)
        names = {path.name for path in [*PACKAGE.glob("*.py"), *fresh.glob("*.py")]}
        names.add("catalogue.json")
        _, changed, missing = filecmp.cmpfiles(PACKAGE, fresh, names, shallow=False)
        return sorted(changed + missing)


# ------------------------------------------------------------------------- run
def staleness(path: Path) -> str:
    "Why the stored outputs of a notebook cannot be trusted; empty if they can."
    notebook = read(path)
    cells = code_cells(notebook)
    if not cells:
        return ""
    stored = notebook.metadata.get("soflow_edu", {})
    if "digest" not in stored:
        return "was never executed as a whole"
    outputs = []
    for cell in cells:
        outputs += cell.outputs
    if any(output.output_type == "error" for output in outputs):
        return "holds an error output"
    if stored["digest"] != digest(sources(notebook)):
        return "was executed with other code than it holds or imports now"
    return ""


def child_seconds() -> float:
    "CPU seconds of all processes that this one has started and seen end."
    times = os.times()
    return times.children_user + times.children_system


def execute(path: Path) -> float:
    """Executes a notebook in a fresh kernel, and stores it with outputs and digest.

    Returns its CPU seconds, which do not depend on other work of the machine."""
    import nbformat
    from nbclient import NotebookClient

    notebook = read(path)
    start = child_seconds()
    client = NotebookClient(
        notebook,
        timeout=CELL_LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(stderr=subprocess.DEVNULL)  # the kernel's own log
    seconds = child_seconds() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    record = {"digest": digest(sources(notebook)), "seconds": round(seconds)}
    metadata = {"kernelspec": kernel, "soflow_edu": record}
    notebook.metadata = nbformat.from_dict(metadata)
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return seconds


def is_progress(output) -> bool:
    stream = output.output_type == "stream" and output.name == "stderr"
    return stream and "\r" in output.text


def continues(output, before) -> bool:
    "Whether an output goes on with the stream of the one before it."
    both = output.output_type == before.output_type == "stream"
    return both and output.name == before.name


def merged(outputs) -> list:
    """Outputs with consecutive pieces of one stream joined, as a reader sees them.

    Progress bars, and what is live only with a kernel, are left out."""
    kept = []
    for output in outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if is_progress(output):
            continue
        if kept and continues(output, kept[-1]):
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


# ------------------------------------------------------------------------- links
def metadata():
    "What settings.ini says, by name."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]


def git_url() -> str:
    return metadata()["git_url"].strip().removesuffix("/").removesuffix(".git")


LINKS = (
    "Open this chapter in "
    "[Colab](https://colab.research.google.com/github/{repository}/blob/HEAD/{place})"
    " or [Binder](https://mybinder.org/v2/gh/{repository}/HEAD?labpath={quoted})."
)
INSTALL = """\
from importlib.util import find_spec
from subprocess import run
from sys import executable

if not find_spec("soflow_edu"):
    package = "soflow_edu[course] @ git+{url}"
    run([executable, "-m", "pip", "install", "-q", package], check=True)"""


def link_cells(path: Path, url: str) -> list:
    """For a notebook: a line of links, and a cell that installs the course from its
    repository, and does nothing if it is there. None without a repository on GitHub."""
    import nbformat

    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)
    if not found:
        return []
    place = path.relative_to(ROOT).as_posix()
    quoted = place.replace("/", "%2F")
    links = LINKS.format(repository=found[1], place=place, quoted=quoted)
    new = nbformat.v4
    return [
        new.new_markdown_cell(links, id="course-links", metadata={"tags": ["links"]}),
        new.new_code_cell(
            INSTALL.format(url=url), id="course-install", metadata={"tags": ["install"]}
        ),
    ]


def set_links(path: Path, url: str):
    "Puts the links of a notebook below its opening, in the place of earlier ones."
    import nbformat

    notebook = read(path)
    own = {"links", "install"}
    cells = [cell for cell in notebook.cells if not own & set(tags(cell))]
    new = link_cells(path, url)
    cells[1:1] = new
    if new or len(cells) != len(notebook.cells):
        notebook.cells = cells
        nbformat.write(notebook, path)


# ------------------------------------------------------------------------- readme
def from_root(text: str) -> str:
    "Links of the index as they read from the root of the repository."
    text = re.sub(r"\]\(((?:\d_\w+|assignments)/)", r"](nbs/\1", text)
    return text.replace("](../", "](")


def as_markdown(output, name: str) -> str:
    "An output of the index as a part of README.md; a picture is written beside it."
    data = output.get("data", {})
    if "image/png" in data:
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / name).write_bytes(base64.b64decode(data["image/png"]))
        return f"![{data.get('text/plain', '')}](nbs/pictures/{name})"
    if "text/markdown" in data:
        return from_root(data["text/markdown"])
    if output.output_type == "stream":
        return "```\n" + output.text.rstrip() + "\n```"
    return ""


def readme() -> str:
    """The text of README.md: the prose of nbs/index.ipynb with the outputs of its
    cells. Writes the pictures to nbs/pictures/."""
    parts = ["<!-- Made from nbs/index.ipynb by `make readme`. -->"]
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for number, cell in enumerate(read(NOTEBOOKS / "index.ipynb").cells):
        if cell.cell_type == "markdown":
            parts.append(from_root(cell.source))
            continue
        if "#| echo" in cell.source:
            code = re.sub(r"#\| .*\n", "", cell.source).strip()
            parts.append(f"```python\n{code}\n```")
        for output in cell.get("outputs", []):
            parts.append(as_markdown(output, f"index-{number}.png"))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


# ------------------------------------------------------------------------ command line
def chosen(names: tuple[str, ...]) -> list[Path]:
    "The notebooks whose path holds one of the names, or all."
    if not names:
        return notebooks()
    found = []
    for path in notebooks():
        place = str(path.relative_to(NOTEBOOKS))
        if any(name in place for name in names):
            found.append(path)
    if not found:
        sys.exit(f"No notebook has one of {', '.join(names)} in its path.")
    return found


def run_check():
    changed = differences()
    if changed:
        sys.exit(
            f"Not what the notebooks export: {', '.join(changed)}. "
            "Edit the notebooks, not the modules, then: make export"
        )
    print("The package is what the notebooks export.")


def run_notebooks(*names: str):
    for path in chosen(names):
        print(f"{path.relative_to(NOTEBOOKS)} ... ", end="", flush=True)
        print(f"{execute(path):.0f} s", flush=True)


def run_readme():
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")


def run_links():
    for path in notebooks():
        if path.parent not in (NOTEBOOKS, NOTEBOOKS / "slides"):
            set_links(path, git_url())


def chapters() -> list[Path]:
    return [path for path in notebooks() if path.parent.name[0].isdigit()]


def run_number():
    equations.renumber(chapters())


def run_equations():
    found = equations.faults(chapters())
    print("\n".join(found))
    sys.exit(1 if found else 0)


def run_style(*names: str):
    found = house.all_findings(ROOT, names)
    for finding in found:
        print(finding)
    sys.exit(1 if found else 0)


def run_measure(revision: str = ""):
    print(measures.report(revision))


COMMANDS = {
    "export": export,
    "check": run_check,
    "run": run_notebooks,
    "readme": run_readme,
    "links": run_links,
    "equations": run_equations,
    "number": run_number,
    "style": run_style,
    "measure": run_measure,
}


def main(command: str = "", *names: str):
    if command not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[command](*names)


if __name__ == "__main__":
    main(*sys.argv[1:])
