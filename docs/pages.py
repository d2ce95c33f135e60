"""Writes what Sphinx reads: the chapters as executed, the reference of the package, equations, configurations, gallery.

    python docs/pages.py FOLDER
"""
import ast
import base64
import dataclasses
import inspect
import io
import re
import shutil
import sys
import textwrap
import tokenize
from importlib import import_module
from pathlib import Path

import nbformat
import yaml

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "nbs"))
import book  # noqa: E402

PARTS = {"0_start": "Start", "1_plane": "The plane", "2_images": "Pictures", "3_imagenet": "ImageNet", "4_practice": "Practice"}


# ---------------------------------------------------------------------------------------------------- chapters
def chapters() -> list:
    return [path for path in book.notebooks() if path.parent.name in PARTS]


def place(path: Path) -> str:
    "Where a chapter stands in the site: 1_plane/08_consistency."
    return f"{path.parent.name}/{path.stem}"


def module_of(notebook) -> str:
    return next((m[1] for cell in book.code_cells(notebook) if (m := re.match(r"#\| default_exp (\w+)", cell.source))), "")


def exported(cell) -> list:
    "Names that a cell exports: functions, classes and constants."
    if cell.cell_type != "code" or not cell.source.startswith("#| export"):
        return []
    found = []
    for node in ast.parse(cell.source).body:
        found += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        targets = [part for target in node.targets for part in getattr(target, "elts", [target])] if isinstance(node, ast.Assign) else []
        found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found


def symbols() -> dict:
    "Where each exported symbol is: module.name -> (path of its chapter, id of its cell)."
    found = {}
    for path in chapters():
        notebook = book.read(path)
        found |= {f"{module_of(notebook)}.{name}": (path, cell.id) for cell in notebook.cells for name in exported(cell)}
    return found


def linked(text: str, places: dict) -> str:
    "Words such as `chapter *guidance*` or `chapters *solution* and *flow_matching*` as links to those chapters; paths of notebooks as paths of pages."
    link = lambda m: f"[*{m[1]}*](/{places[m[1].replace('_', ' ')]})" if m[1].replace("_", " ") in places else m[0]
    text = re.sub(r"[Cc]hapters?(?:,? (?:and )?\*\w[\w -]*\*)+", lambda names: re.sub(r"\*(\w[\w -]*)\*", link, names[0]), text)
    return re.sub(r"\]\((?:\.\./)*((?:\d_\w+)/\d\d_\w+\.ipynb)", r"](/\1", text)


def chapter(path: Path, places: dict):
    "A chapter for the site: texts for those who do not see a figure, folded solutions, an anchor at each exported name."
    notebook, cells = book.read(path), []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, places)
        if exported(cell):
            cells.append(nbformat.v4.new_markdown_cell(f"(cell-{cell.id})="))
        if "install" in cell.metadata.get("tags", []):
            continue
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-cell")
        figures = [output.data["text/plain"] for output in getattr(cell, "outputs", []) if "image/png" in output.get("data", {})]
        if figures:
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(figures)}}      # one text for all figures of a cell
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\| .*\n?", "", cell.source, flags=re.M)
        if cell.source.strip():
            cells.append(cell)
    notebook.cells = cells
    return notebook


# ---------------------------------------------------------------------------------------------------- reference
def reference(module: str, path: Path, known: dict) -> str:
    "The page of a module: each exported name with its signature, what its parameters are, and where it is explained."
    loaded = import_module(f"soflow_edu.{module}")
    lines = [f"# {module}", "", f"Explained in [{heading(path)}](/{place(path)}.ipynb).", ""]
    for name in loaded.__all__:
        value = getattr(loaded, name)
        lines += [f"## {name}", "", f"[source and explanation](#cell-{known[f'{module}.{name}'][1]})", ""]
        if not callable(value) or not getattr(value, "__doc__", ""):
            lines += [] if callable(value) else ["```text", f"{name} = {shortened(value)}", "```", ""]
            if not callable(value):
                continue
        lines += ["```python", signature(name, value), "```", ""]
        lines += [inspect.cleandoc(value.__doc__), ""] if own_doc(value) else []
        lines += parameters(value)
    return "\n".join(lines)


def own_doc(value) -> bool:
    return bool(value.__doc__) and not (inspect.isclass(value) and value.__doc__.startswith(f"{value.__name__}("))


def shortened(value, length: int = 200) -> str:
    text = repr(value).replace(f"{ROOT}/", "")
    return text if len(text) <= length else text[:length] + " ..."


def signature(name: str, value) -> str:
    "As written, with types by their names alone."
    try:
        return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", f"{'class ' if inspect.isclass(value) else ''}{name}{inspect.signature(value)}")
    except (ValueError, TypeError):
        return name


def comments(source: str) -> list:
    "Of a function's source: (names of the parameters on a line of its signature, the comment at its end); no names where the line holds the result only, None where it holds everything."
    rows, names, depth, last, whole = [], [], 0, "", True
    source = re.sub(r"\A.*?(?=^def )", "", source, flags=re.M | re.S)          # without decorators
    if not source.startswith("def "):
        return []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and depth == 1 and last in ("(", ",", "*", "**"):
            names.append(token.string)
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        if token.type == tokenize.COMMENT:
            rows.append((names, token.string.lstrip("# ").strip()))
        if token.type == tokenize.NL:
            names, whole = [], False
        if token.type == tokenize.NEWLINE:                       # the signature, and its comment, end here
            return [(None, text) for _, text in rows] if whole else rows
        last = token.string if token.type in (tokenize.OP, tokenize.NAME) else last
    return rows


def fields(source: str) -> list:
    "Of a class's source: the same for its annotated fields."
    lines = source.splitlines()
    body = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return [([node.target.id], lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")) for node in body if lines[node.end_lineno - 1][node.end_col_offset:].strip().startswith("#")]


def parameters(value) -> list:
    "A table of the comments beside parameters or fields, as rows of Markdown."
    init = vars(value).get("__init__") if inspect.isclass(value) else value
    try:
        source = textwrap.dedent(inspect.getsource(value))
        rows = fields(source) if inspect.isclass(value) and dataclasses.is_dataclass(value) else comments(textwrap.dedent(inspect.getsource(inspect.unwrap(init)))) if init else []
    except (OSError, TypeError):                     # made by a call, without a source of its own
        return []
    label = lambda names: "in and out" if names is None else ", ".join(f"`{name}`" for name in names if name != "self") or "returns"
    cell = lambda text: " ".join(text.split()).replace("|", "\\|")
    return ["| parameter | |", "|---|---|", *(f"| {label(names)} | {cell(text)} |" for names, text in rows), ""] if rows else []


def heading(path: Path) -> str:
    return re.match(r"# (.+)", book.read(path).cells[0].source)[1].strip()


# ---------------------------------------------------------------------------------------------------- other pages
def configurations() -> str:
    "The ladder of configurations, a row for each, and below it each file."
    lines = ["# Configurations", "", "`soflow train NAME --out FOLDER` trains one of these. *Expected* says what a run should give, in which band, and whether that was published or measured here.", "",
             "| name | for | minutes | expected |", "|---|---|---|---|"]
    files = sorted((ROOT / "soflow_edu/configs").glob("*.yaml"))
    for path in files:
        about = yaml.safe_load(path.read_text(encoding="utf-8")).get("about", {})
        bands = "; ".join(f"{band['metric']} {band['low']} to {band['high']} ({band['source']})" for band in about.get("expected", []))
        lines.append(f"| [{path.stem}](#{path.stem}) | {about.get('hardware', '')} | {about.get('minutes', '')} | {bands} |")
    for path in files:
        lines += ["", f"({path.stem})=", f"## {path.stem}", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(lines) + "\n"


def equations() -> str:
    "Each equation with the cell and the symbol that implements it. Raises ValueError if one has no cell."
    known = symbols()
    lines = ["# Equations and where they live", "", "Each formula of the paper and of the methods beside it, the symbol that implements it, and the chapter that derives and checks it.", ""]
    for part, rows in yaml.safe_load((DOCS / "equations.yaml").read_text(encoding="utf-8")).items():
        lines += [f"## {part}", ""]
        for row in rows:
            if missing := [symbol for symbol in row["symbols"] or ["(none named)"] if symbol not in known]:
                raise ValueError(f"The equation {row['name']!r} has no cell: no chapter exports {', '.join(missing)}.")
            lines += [f"**{row['name']}**", "", "$$", row["tex"].strip(), "$$", "", "; ".join(f"[`{symbol}`](#cell-{known[symbol][1]}) in [{heading(known[symbol][0])}](/{place(known[symbol][0])}.ipynb)" for symbol in row["symbols"]), ""]
    return "\n".join(lines)


def gallery(folder: Path) -> str:
    "The first figure of each chapter, with its text, as links."
    (folder / "gallery").mkdir()
    lines = ["# Gallery", ""]
    for path in chapters():
        found = next((output.data for cell in book.code_cells(book.read(path)) for output in cell.outputs if "image/png" in output.get("data", {})), None)
        if found:
            picture = folder / "gallery" / f"{path.stem}.png"
            picture.write_bytes(base64.b64decode(found["image/png"]))
            lines += [f"## [{heading(path)}](/{place(path)}.ipynb)", "", f"![{found['text/plain']}](/gallery/{picture.name})", "", found["text/plain"], ""]
    return "\n".join(lines)


def front() -> str:
    "The first page: that of the repository, without links out of the site, and the contents."
    text = re.sub(r"\]\(nbs/(pictures/)", r"](/\1", book.readme().partition("-->")[2])
    text = re.sub(r"\[([^\]]*)\]\((?:nbs/assignments/|[A-Z]+\.md)[^)]*\)", r"\1", text)
    text = re.sub(r"\]\(nbs/", "](/", text)
    text += '\n\n<p><a href="4_practice/play.html">Drag the noise</a>: a page in which the trained map answers while you drag its input (chapter <i>play</i>).</p>\n\n'
    toc = lambda caption, entries: [":::{toctree}", ":hidden:", f":caption: {caption}", "", *entries, ":::", ""]
    lines = [text]
    for part, caption in PARTS.items():
        lines += toc(caption, [place(path) for path in chapters() if path.parent.name == part])
    lines += toc("To look things up", ["configurations", "equations", "gallery", "reference"])
    return "\n".join(lines)


def write_play(folder: Path):
    "The page of chapter play, beside it: what Sphinx copies as it is."
    from soflow_edu.cifar10 import load_weights
    from soflow_edu.distributions import law_of
    from soflow_edu.play import write_page

    (folder / "4_practice").mkdir(parents=True)
    write_page(folder / "4_practice/play.html", load_weights("plane-labelled"), law_of("eight_gaussians"))


def write(folder: Path):
    "All pages, into a new folder, and into its folder _extra what is no page."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places = {path.stem[3:].replace("_", " "): f"{place(path)}.ipynb" for path in chapters()}
    for path in chapters():
        target = folder / f"{place(path)}.ipynb"
        target.parent.mkdir(exist_ok=True)
        nbformat.write(chapter(path, places), target)
    shutil.copytree(ROOT / "nbs/pictures", folder / "pictures")
    write_play(folder / "_extra")
    (folder / "reference").mkdir()
    known = symbols()
    modules = [(module, path) for path in chapters() if (module := module_of(book.read(path)))]
    for module, path in modules:
        (folder / f"reference/{module}.md").write_text(reference(module, path, known), encoding="utf-8")
    listing = ["# Reference", "", *(f"- [{module}](/reference/{module}.md)" for module, _ in modules), "", ":::{toctree}", ":hidden:", "", *(f"reference/{module}" for module, _ in modules), ":::"]
    pages = {"index": front(), "configurations": configurations(), "equations": equations(), "gallery": gallery(folder), "reference": "\n".join(listing)}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
