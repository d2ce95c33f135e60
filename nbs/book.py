"""Keeps the book: exports the notebooks, checks that they agree with the package, executes them, and writes README.md.

    python nbs/book.py export             notebooks -> soflow_edu/
    python nbs/book.py check              exit 1 if the package is not what the notebooks export
    python nbs/book.py run [NAME ...]     execute all notebooks, or those whose path holds a NAME, and store their outputs
    python nbs/book.py readme             nbs/index.ipynb -> README.md and nbs/pictures/
    python nbs/book.py links              links to Colab and Binder, and a cell that installs, into each chapter; out of it if settings.ini names no git_url
"""
import ast
import base64
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, PACKAGE = ROOT / "nbs", ROOT / "soflow_edu"
WRITTEN_BY_HAND = {"__init__.py", "__main__.py"}   # every other module is exported from a notebook
CELL_LIMIT = 240                    # seconds a cell may take


def notebooks() -> list:
    "All notebooks in reading order: the index, then the chapters."
    found = [p for p in NOTEBOOKS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NOTEBOOKS).parts)]
    return sorted(found, key=lambda p: (p.parent != NOTEBOOKS, str(p)))


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    "Without the cell that installs the package where a chapter is opened alone."
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip() and "install" not in cell.metadata.get("tags", [])]


# ---------------------------------------------------------------------------------------------------- export and check
def export(root: Path = ROOT):
    "Exports the notebooks below root/nbs and removes modules that no notebook exports any more."
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=root, check=True, stdout=subprocess.DEVNULL)
    exported = {m[1] + ".py" for p in (root / "nbs").rglob("*.ipynb") for m in re.finditer(r"#\| default_exp (\w+)", p.read_text(encoding="utf-8"))}
    for module in (root / "soflow_edu").glob("*.py"):
        if module.name not in exported | WRITTEN_BY_HAND | {"_modidx.py"}:
            module.unlink()


def differences() -> list:
    "Names of modules that are not what the notebooks export, found by exporting a copy."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(NOTEBOOKS, copy / "nbs", ignore=shutil.ignore_patterns(".*", "__pycache__", "kernel-*"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "soflow_edu").mkdir()
        for name in WRITTEN_BY_HAND:
            shutil.copy(PACKAGE / name, copy / "soflow_edu")
        export(copy)
        names = {p.name for folder in (PACKAGE, copy / "soflow_edu") for p in folder.glob("*.py")}
        return sorted(filecmp.cmpfiles(PACKAGE, copy / "soflow_edu", names, shallow=False)[1] + filecmp.cmpfiles(PACKAGE, copy / "soflow_edu", names, shallow=False)[2])


# ---------------------------------------------------------------------------------------------------- digest
def without_magic(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def imported(source: str) -> set:
    "Names of the modules of soflow_edu that a piece of code imports."
    found = set()
    for node in ast.walk(ast.parse(without_magic(source))):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 and node.module or (node.module or "").startswith("soflow_edu.")):
            found.add(node.module.removeprefix("soflow_edu."))
        elif isinstance(node, ast.ImportFrom) and (node.level == 1 or node.module == "soflow_edu"):
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("soflow_edu.")}
    return found


def catalogue() -> dict:
    "Which module each registered name lives in, read from the source of config; readers of files apart, which no configuration names."
    for node in ast.walk(ast.parse((PACKAGE / "config.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and node.targets[0].id == "CATALOGUE":
            return {name: module for kind, entries in ast.literal_eval(node.value).items() if kind != "reader" for name, module in entries.items()}
    raise ValueError("config.py holds no CATALOGUE")


def built(code: str) -> set:
    "Modules of the components that code names: in its own strings, or through the configurations if it reads one."
    words = {node.value for node in ast.walk(ast.parse(without_magic(code))) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = words | texts(yaml.safe_load_all(configurations(code)))
    return {module for name, module in catalogue().items() if name in named and (PACKAGE / f"{module}.py").exists()}


def texts(content) -> set:
    "All texts in what a YAML file holds, but for keys."
    parts = content.values() if isinstance(content, dict) else [] if isinstance(content, str) or not hasattr(content, "__iter__") else content
    return {content} if isinstance(content, str) else {text for part in parts for text in texts(part)}


READS, LISTS = ("load_config", "soflow demo", "soflow_edu.cli", "main(["), ("soflow demo", "soflow_edu.cli", "main([", "shipped_configs", "rungs", "ladder_table", "verdict(")


def configurations(code: str) -> str:
    "The shipped configurations that code reads: those that it names, if it only loads some by name, and otherwise all."
    if not any(word in code for word in READS):
        return ""
    loads = [node.args for node in ast.walk(ast.parse(without_magic(code))) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "load_config"]
    named = {args[0].value if args and isinstance(args[0], ast.Constant) else None for args in loads}
    every = None in named or not named or any(word in code for word in LISTS)
    return "\n---\n".join(path.read_text(encoding="utf-8") for path in sorted((PACKAGE / "configs").glob("*.yaml")) if every or path.stem in named)


def digest(notebook) -> str:
    "A hash of the code cells, of every module that they import or build, directly or through another module, and of the configurations that they read."
    code = "\n\n".join(cell.source for cell in code_cells(notebook))
    run = "\n\n".join(cell.source for cell in code_cells(notebook) if not cell.source.startswith("#| export"))
    waiting, modules = imported(code) | built(run), {}
    while waiting:
        name = waiting.pop()
        modules[name] = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        waiting |= imported(modules[name]) - modules.keys()
    # Neither the comments in which nbdev names the cell of origin nor empty lines are part of what a module does.
    text = [re.sub(r"^# %% .*$", "", modules[name], flags=re.M) for name in sorted(modules)]
    if settings := configurations(run):
        text.append(settings)
    return hashlib.sha256("\0".join(re.sub(r"\n\s*\n+", "\n", part) for part in [code, *text]).encode()).hexdigest()[:16]


def staleness(path: Path) -> str:
    "Why the stored outputs of a notebook cannot be trusted; empty if they can."
    notebook = read(path)
    cells = code_cells(notebook)
    if not cells:
        return ""
    if "digest" not in notebook.metadata.get("soflow_edu", {}):
        return "was never executed as a whole"
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        return "holds an error output"
    if notebook.metadata.soflow_edu.digest != digest(notebook):
        return "was executed with other code than it holds or imports now"
    return ""


# ---------------------------------------------------------------------------------------------------- run
def execute(path: Path) -> float:
    "Executes a notebook in a fresh kernel, stores it with its outputs and digest, and returns the CPU seconds it took, which do not depend on what else the machine does."
    import nbformat
    from nbclient import NotebookClient

    notebook = read(path)
    spent = lambda: os.times().children_user + os.times().children_system
    start = spent()
    client = NotebookClient(notebook, timeout=CELL_LIMIT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(stderr=subprocess.DEVNULL)   # the kernel's own log; errors of cells are raised here
    seconds = spent() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "soflow_edu": {"digest": digest(notebook), "seconds": round(seconds)},
    })
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    return seconds


def merged(outputs) -> list:
    "Outputs with consecutive pieces of one stream joined, as a reader sees them; progress bars, and what is live only with a kernel, are left out."
    kept = []
    for output in outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if output.output_type == "stream" and output.name == "stderr" and "\r" in output.text:
            continue
        if kept and output.output_type == "stream" == kept[-1].output_type and kept[-1].name == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


# ---------------------------------------------------------------------------------------------------- links
def metadata():
    "What settings.ini says, by name."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]


def git_url() -> str:
    return metadata()["git_url"].strip().removesuffix("/").removesuffix(".git")


def link_cells(path: Path, url: str) -> list:
    "For a notebook: a line of links, and a cell that installs the course from its repository, and does nothing if it is there. None without a repository on GitHub."
    import nbformat

    if not (repository := re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)):
        return []
    place = path.relative_to(ROOT).as_posix()
    links = f"Open this chapter in [Colab](https://colab.research.google.com/github/{repository[1]}/blob/HEAD/{place}) or [Binder](https://mybinder.org/v2/gh/{repository[1]}/HEAD?labpath={place.replace('/', '%2F')})."
    install = f'''from importlib.util import find_spec
from subprocess import run
from sys import executable

if not find_spec("soflow_edu"): run([executable, "-m", "pip", "install", "-q", "soflow_edu[course] @ git+{url}"], check=True)'''
    return [nbformat.v4.new_markdown_cell(links, id="course-links", metadata={"tags": ["links"]}), nbformat.v4.new_code_cell(install, id="course-install", metadata={"tags": ["install"]})]


def set_links(path: Path, url: str):
    "Puts the links of a notebook below its opening, in the place of earlier ones."
    import nbformat

    notebook = read(path)
    cells = [cell for cell in notebook.cells if not {"links", "install"} & set(cell.metadata.get("tags", []))]
    cells[1:1] = link_cells(path, url)
    if [cell.id for cell in cells] != [cell.id for cell in notebook.cells] or link_cells(path, url):
        notebook.cells = cells
        nbformat.write(notebook, path)


# ---------------------------------------------------------------------------------------------------- readme
PICTURES = ROOT / "nbs" / "pictures"


def readme() -> str:
    "The text of README.md: the prose of nbs/index.ipynb with the outputs of its cells; writes the pictures to nbs/pictures/."
    parts = []
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for number, cell in enumerate(read(NOTEBOOKS / "index.ipynb").cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\(((?:\d_\w+|assignments)/)", r"](nbs/\1", cell.source))
            continue
        if "#| echo" in cell.source:
            parts.append("```python\n" + re.sub(r"#\| .*\n", "", cell.source).strip() + "\n```")
        for output in getattr(cell, "outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                PICTURES.mkdir(exist_ok=True)
                name = f"index-{number}.png"
                (PICTURES / name).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![{data.get('text/plain', '')}](nbs/pictures/{name})")
            elif "text/markdown" in data:
                parts.append(re.sub(r"\]\(((?:\d_\w+|assignments)/)", r"](nbs/\1", data["text/markdown"]))
            elif output.output_type == "stream":
                parts.append("```\n" + output.text.rstrip() + "\n```")
    return "<!-- Made from nbs/index.ipynb by `make readme`. -->\n\n" + "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


# ---------------------------------------------------------------------------------------------------- command line
def main(command: str = "", *names: str):
    if command == "export":
        export()
    elif command == "check":
        if changed := differences():
            sys.exit(f"Not what the notebooks export: {', '.join(changed)}. Edit the notebooks, not the modules, then: make export")
        print("The package is what the notebooks export.")
    elif command == "run":
        chosen = [p for p in notebooks() if not names or any(name in str(p.relative_to(NOTEBOOKS)) for name in names)]
        if not chosen:
            sys.exit(f"No notebook has one of {', '.join(names)} in its path.")
        for path in chosen:
            print(f"{path.relative_to(NOTEBOOKS)} ... ", end="", flush=True)
            print(f"{execute(path):.0f} s")
    elif command == "readme":
        text = readme()
        (ROOT / "README.md").write_text(text, encoding="utf-8")
    elif command == "links":
        for path in notebooks():
            if path.parent != NOTEBOOKS:
                set_links(path, git_url())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
