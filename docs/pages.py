"""Writes what Sphinx reads: the chapters as executed, the reference of the package,
equations, configurations, gallery, related work, standings.

python docs/pages.py FOLDER
"""

import ast
import base64
import dataclasses
import inspect
import io
import re
import shutil
import statistics
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import nbformat
import yaml

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "nbs"))
import book  # noqa: E402
import equations  # noqa: E402

PARTS = {
    "0_start": "Start",
    "1_plane": "The plane",
    "2_images": "Pictures",
    "3_imagenet": "ImageNet",
    "4_practice": "Practice",
}
WIDTH = 88  # columns of a signature

Notebook = nbformat.NotebookNode
Places = dict[str, tuple[Path, str]]  # module.name -> its chapter, the id of its cell


# ------------------------------------------------------------------------ chapters
def chapters() -> list[Path]:
    return [path for path in book.notebooks() if path.parent.name in PARTS]


def place(path: Path) -> str:
    "Where a chapter stands in the site: 1_plane/08_consistency."
    return f"{path.parent.name}/{path.stem}"


@cache
def heading(path: Path) -> str:
    first = book.read(path).cells[0].source
    return re.match(r"# (.+)", first)[1].strip()


def link_to(path: Path) -> str:
    "A link to a chapter that reads as its heading."
    return f"[{heading(path)}](/{place(path)}.ipynb)"


def module_of(notebook: Notebook) -> str:
    "The module that a notebook exports, or an empty string."
    for cell in book.code_cells(notebook):
        found = re.match(r"#\| default_exp (\w+)", cell.source)
        if found:
            return found[1]
    return ""


def chapters_with_modules() -> dict[str, Path]:
    "The chapter of each module, in reading order."
    found = {module_of(book.read(path)): path for path in chapters()}
    found.pop("", None)
    return found


def assigned(targets: list[ast.expr]) -> list[str]:
    "The names among the targets of an assignment."
    names = []
    for target in targets:
        for part in getattr(target, "elts", [target]):
            if isinstance(part, ast.Name):
                names.append(part.id)
    return names


def exported(cell: Notebook) -> list[str]:
    "Names that a cell exports: functions, classes and constants."
    if cell.cell_type != "code" or not cell.source.startswith("#| export"):
        return []
    found = []
    for node in ast.parse(cell.source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += assigned(node.targets)
        elif isinstance(node, ast.AnnAssign):
            found += assigned([node.target])
    return found


def symbols() -> Places:
    "Where each exported symbol is explained."
    found = {}
    for module, path in chapters_with_modules().items():
        for cell in book.read(path).cells:
            for name in exported(cell):
                found[f"{module}.{name}"] = (path, cell.id)
    return found


NAMES_OF_CHAPTERS = re.compile(r"[Cc]hapters?(?:,? (?:and )?\*\w[\w -]*\*)+")
PATH_OF_NOTEBOOK = re.compile(r"\]\((?:\.\./)*((?:\d_\w+)/\d\d_\w+\.ipynb)")


def linked(text: str, places: dict[str, str]) -> str:
    """Prose with its chapters as links, and paths of notebooks as paths of pages.

    A chapter is named as in `chapter *guidance*` or in `chapters *solution* and
    *flow_matching*`; `places` holds the page of each name."""

    def link(name: re.Match) -> str:
        words = name[1].replace("_", " ")
        return f"[*{name[1]}*](/{places[words]})" if words in places else name[0]

    def links(names: re.Match) -> str:
        return re.sub(r"\*(\w[\w -]*)\*", link, names[0])

    text = NAMES_OF_CHAPTERS.sub(links, text)
    return PATH_OF_NOTEBOOK.sub(r"](/\1", text)


def places_by_name() -> dict[str, str]:
    "The page of each chapter, by its name in prose."
    found = {}
    for path in chapters():
        name = path.stem[3:].replace("_", " ")
        found[name] = f"{place(path)}.ipynb"
    return found


def with_tags(text: str) -> str:
    """Prose in which formulas of several lines with a tag are environments.

    Sphinx would put them into `split`, where MathJax takes no tag."""

    def environment(block: re.Match) -> str:
        if "\\\\" not in block[1] or "\\tag{" not in block[1]:
            return block[0]
        return f"\\begin{{equation*}}\n{block[1].strip()}\n\\end{{equation*}}"

    return re.sub(r"\$\$(.+?)\$\$", environment, text, flags=re.S)


def pictures(cell: Notebook) -> list[Notebook]:
    "The data of each figure among the outputs of a cell."
    every = [output.get("data", {}) for output in cell.get("outputs", [])]
    return [data for data in every if "image/png" in data]


def as_code(cell: Notebook):
    "A code cell for the site: its figures have a text, its directives are gone."
    texts = [data["text/plain"] for data in pictures(cell)]
    if texts:  # Sphinx knows one text for all figures of a cell
        cell.metadata["mystnb"] = {"image": {"alt": " ".join(texts)}}
    cell.source = re.sub(r"^#\| .*\n?", "", cell.source, flags=re.M)


def site_cells(cell: Notebook, places: dict[str, str]) -> Iterator[Notebook]:
    "What stands in the site for a cell, an anchor before it if it exports a name."
    tags = book.tags(cell)
    if exported(cell):
        yield nbformat.v4.new_markdown_cell(f"(cell-{cell.id})=")
    if "install" in tags:
        return
    if "solution" in tags:
        cell.metadata.tags.append("hide-cell")
    if cell.cell_type == "markdown":
        cell.source = with_tags(linked(cell.source, places))
    if cell.cell_type == "code":
        as_code(cell)
    if cell.source.strip():
        yield cell


def chapter(path: Path, places: dict[str, str]) -> Notebook:
    """A chapter for the site: texts for those who do not see a figure, folded
    solutions, an anchor at each exported name."""
    notebook = book.read(path)
    cells = []
    for cell in notebook.cells:
        cells += site_cells(cell, places)
    notebook.cells = cells
    return notebook


# ----------------------------------------------------------------------- reference
def reference(module: str, path: Path, known: Places) -> str:
    """The page of a module: each public name with its signature, what its parameters
    are, and where it is explained."""
    loaded = import_module(f"soflow_edu.{module}")
    lines = [f"# {module}", "", f"Explained in {link_to(path)}.", ""]
    for name in loaded.__all__:
        _, cell = known[f"{module}.{name}"]
        lines += [f"## {name}", "", f"[source and explanation](#cell-{cell})", ""]
        lines += entry(name, getattr(loaded, name))
    return "\n".join(lines)


def entry(name: str, value: object) -> list[str]:
    "What the reference says of a name, as lines of Markdown."
    if not callable(value):
        return ["```text", f"{name} = {shortened(value)}", "```", ""]
    lines = ["```python", signature(name, value), "```", ""]
    if own_doc(value):
        lines += [inspect.cleandoc(value.__doc__), ""]
    return lines + parameters(value)


def own_doc(value: Callable) -> bool:
    "Whether it has a docstring that dataclass did not write."
    if not value.__doc__:
        return False
    if not inspect.isclass(value):
        return True
    return not value.__doc__.startswith(f"{value.__name__}(")


def shortened(value: object, length: int = 200) -> str:
    text = repr(value).replace(f"{ROOT}/", "")
    return text if len(text) <= length else text[:length] + " ..."


def signature(name: str, value: Callable) -> str:
    "As written, with types by their names alone; long ones in a line a parameter."
    try:
        found = inspect.signature(value)
    except (ValueError, TypeError):
        return name
    kind = "class " if inspect.isclass(value) else ""
    text = without_modules(f"{kind}{name}{found}")
    if len(text) <= WIDTH:
        return text
    empty = found.replace(parameters=[])
    opening, _, end = without_modules(f"{kind}{name}{empty}").partition("()")
    inner = [f"    {without_modules(part)}," for part in parts_of(found)]
    return "\n".join([f"{opening}(", *inner, f"){end}"])


def parts_of(found: inspect.Signature) -> list[str]:
    "The parameters as written, and the bare star before those given by name only."
    parts = [str(part) for part in found.parameters.values()]
    kinds = [part.kind for part in found.parameters.values()]
    named = inspect.Parameter.KEYWORD_ONLY
    if named in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(named), "*")
    return parts


def without_modules(text: str) -> str:
    "torch.Tensor as Tensor."
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


# A line of a signature: the names on it, and the comment at its end. No names: the line
# holds the result only. None: it holds the whole signature.
Row = tuple[list[str] | None, str]


def comments_by_line(source: str, first: int = 1) -> dict[int, str]:
    "The comments of a source from a line on, by the number of the line."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[0] >= first:
            found[token.start[0]] = token.string.lstrip("# ").strip()
    return found


def last_line(source: str, first: int) -> int:
    "The number of the line on which the logical line ends that begins on `first`."
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE and token.start[0] >= first:
            return token.start[0]
    return first


def arguments_of(node: ast.FunctionDef) -> list[ast.arg]:
    "All parameters, in the order in which they are written."
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs]
    every.append(given.kwarg)
    return [argument for argument in every if argument]


def comments(source: str) -> list[Row]:
    "The commented lines of a function's signature."
    node = parsed(source)
    if not isinstance(node, ast.FunctionDef):
        return []
    first = node.lineno
    last = last_line(source, first)
    rows: list[Row] = []
    for line, text in comments_by_line(source, first).items():
        if line > last:
            break
        names = [part.arg for part in arguments_of(node) if part.end_lineno == line]
        rows.append((None if first == last else names, text))
    return rows


def fields(source: str) -> list[Row]:
    "The commented lines among the annotated fields of a class."
    beside = comments_by_line(source)
    rows: list[Row] = []
    for node in parsed(source).body:
        if isinstance(node, ast.AnnAssign) and node.end_lineno in beside:
            rows.append(([node.target.id], beside[node.end_lineno]))
    return rows


def parsed(source: str) -> ast.stmt | None:
    "The first statement of a source; None for a piece that is none, as of a lambda."
    try:
        return ast.parse(source).body[0]
    except SyntaxError:
        return None


def source_of(value: Callable) -> str:
    return textwrap.dedent(inspect.getsource(value))


def rows_of(value: Callable) -> list[Row]:
    "The commented parameters of a function or a class, or fields of a dataclass."
    if dataclasses.is_dataclass(value):
        return fields(source_of(value))
    if not inspect.isclass(value):
        return comments(source_of(inspect.unwrap(value)))
    own = vars(value).get("__init__")
    return comments(source_of(inspect.unwrap(own))) if own else []


def label(names: list[str] | None) -> str:
    "What the left column says of a line with these names."
    if names is None:
        return "in and out"
    shown = [f"`{name}`" for name in names if name != "self"]
    return ", ".join(shown) or "returns"


def parameters(value: Callable) -> list[str]:
    "A table of the comments beside parameters or fields, as rows of Markdown."
    try:
        rows = rows_of(value)
    except (OSError, TypeError):  # made by a call, without a source of its own
        return []
    if not rows:
        return []
    lines = ["| parameter | |", "|---|---|"]
    for names, text in rows:
        words = " ".join(text.split()).replace("|", "\\|")
        lines.append(f"| {label(names)} | {words} |")
    return [*lines, ""]


def reference_list(modules: list[str]) -> str:
    "The page that leads to the pages of the modules."
    lines = ["# Reference", ""]
    lines += [f"- [{module}](/reference/{module}.md)" for module in modules]
    lines += ["", ":::{toctree}", ":hidden:", ""]
    lines += [f"reference/{module}" for module in modules]
    return "\n".join([*lines, ":::"])


# ------------------------------------------------------------------- configurations
def band_text(band: dict) -> str:
    return f"{band['metric']} {band['low']} to {band['high']} ({band['source']})"


def configuration_row(path: Path) -> str:
    about = yaml.safe_load(path.read_text(encoding="utf-8")).get("about", {})
    bands = "; ".join(band_text(band) for band in about.get("expected", []))
    hardware = about.get("hardware", "")
    minutes = about.get("minutes", "")
    return f"| [{path.stem}](#{path.stem}) | {hardware} | {minutes} | {bands} |"


CONFIGURATIONS = (
    "`soflow train NAME --out FOLDER` trains one of these. *Expected* says what a run "
    "should give, in which band, and whether that was published or measured here."
)


def configurations() -> str:
    "The ladder of configurations, a row for each, and below it each file."
    files = sorted((ROOT / "soflow_edu/configs").glob("*.yaml"))
    lines = ["# Configurations", "", CONFIGURATIONS, ""]
    lines += ["| name | for | minutes | expected |", "|---|---|---|---|"]
    lines += [configuration_row(path) for path in files]
    for path in files:
        text = path.read_text(encoding="utf-8").rstrip()
        lines += ["", f"({path.stem})=", f"## {path.stem}", ""]
        lines += ["```yaml", text, "```"]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------- equations
EQUATIONS = (
    "Each numbered equation of the course, where it comes from, and the symbols that "
    "implement it. The code names an equation by its number, as in `eq. 1.8.3`: part, "
    "chapter, place in the chapter."
)


def unlisted(rows: dict[str, dict]) -> list[str]:
    "The numbers of displayed equations that have no row in docs/equations.yaml."
    found = []
    for path in chapters():
        numbers = [equation.number for equation in equations.displayed(path)]
        found += [number for number in numbers if number not in rows]
    return found


def equation_entry(equation: equations.Equation, row: dict, known: Places) -> list[str]:
    """An equation of the page as lines of Markdown.

    Raises ValueError if it has no cell."""
    missing = [symbol for symbol in row["symbols"] if symbol not in known]
    if missing or not row["symbols"]:
        symbols = ", ".join(missing) or "(none named)"
        message = (
            f"The equation {row['name']!r} ({equation.number}) has no cell: "
            f"no chapter exports {symbols}."
        )
        raise ValueError(message)
    lines = [f"**{row['name']}**: {row['source']}", ""]
    formula = f"$$\n{equation.tex} \\tag{{{equation.number}}}\n$$"
    lines += [with_tags(formula), ""]
    links = []
    for symbol in row["symbols"]:
        path, cell = known[symbol]
        links.append(f"[`{symbol}`](#cell-{cell}) in {link_to(path)}")
    return [*lines, "; ".join(links), ""]


def equation_page() -> str:
    """Each equation, by chapter, with the symbols that implement it and their cells.

    Raises ValueError if one has no row in docs/equations.yaml, or no cell."""
    known = symbols()
    rows = equations.listed()
    missing = unlisted(rows)
    if missing:
        message = f"docs/equations.yaml has no row for: {', '.join(missing)}."
        raise ValueError(message)
    lines = ["# Equations and where they live", "", EQUATIONS, ""]
    for path in chapters():
        found = equations.displayed(path)
        if found:
            lines += [f"## {link_to(path)}", ""]
        for equation in found:
            lines += equation_entry(equation, rows[equation.number], known)
    return "\n".join(lines)


# -------------------------------------------------------------------- related work
def with_classes(text: str, known: Places) -> str:
    "Prose in which exported classes, as in `MeanFlow`, are links to their cells."
    cells = {}
    for name, (_, cell) in known.items():
        cells[name.partition(".")[2]] = cell

    def link(words: re.Match) -> str:
        cell = cells.get(words[1])
        return f"[`{words[1]}`](#cell-{cell})" if cell else words[0]

    return re.sub(r"`([A-Z]\w+)`", link, text)


def related() -> str:
    "docs/related.md, in which the names of chapters and classes are links."
    text = (DOCS / "related.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]*)\]\(\.\./[A-Z]+\.md\)", r"\1", text)
    return with_classes(linked(text, places_by_name()), symbols())


# ----------------------------------------------------------------------- standings
STANDINGS = """# Standings

One-step maps beside the exact flow of thirteen problems in 2 to 512 dimensions
({chapter}). Every entry has {steps:,} steps of 256 samples on one thread and the seeds
10, 11 and 12. The number of an entry is the geometric mean over the problems of its
relative error, seeds averaged first; *shares* is the largest error of the share of a
mode, a mean over the mixtures. Entries that lack rows or that diverged stand last.
Entries whose errors overlap on most problems are not told apart.
"""
NO_ROWS = "No rows are stored yet: `soflow bench dimensions` computes them."
ADD_A_ROW = """## Add a line

1. Write the method into one file, with a registered entry or only a registered
   objective, whose name is then the entry:

   ```python
   # my_method.py
   from soflow_edu.core import register
   from soflow_edu.dimensions import Entry

   setting = {"objective": {"name": "soflow", "lam": 0.25}, "learning_rate": 4e-3}
   register("entry", "mine")(Entry("mine", "SoFlow, lam 0.25", setting))
   ```

2. Compute its rows with the seeds 10, 11 and 12. They are written as they come, and the
   same command goes on where it was stopped:

   ```
   soflow bench dimensions --import my_method.py --entries mine
   ```

3. Commit the file `data/runs/dimensions/mine.json`. Settings must not have been chosen
   by these seeds, and a method may use nothing but samples.

Anybody can check any row. It is trained again and compared with the stored one:

```
soflow bench dimensions --recompute soflow mixture-32 11
```
"""


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float, digits: int = 3) -> str:
    "A number for a table; a dash for none."
    return "-" if value != value else f"{value:.{digits}f}"


def standing_rows(lines: list) -> list[str]:
    "The table of the standings, as rows of Markdown."
    heads = ["", "entry", "one step", "four steps", "shares", "ms a step", "remark"]
    found = [markdown_row(heads), "|---|---|---|---|---|---|---|"]
    for place, line in enumerate(lines, 1):
        remark = line.note
        if not line.complete:
            remark = f"{line.failed} diverged" if line.failed else "incomplete"
        measures = [number(line.error), number(line.four), number(line.shares)]
        measures.append(number(line.step_ms, 1))
        order = str(place) if line.complete else "-"
        found.append(markdown_row([order, line.label, *measures, remark]))
    return found


def problem_rows(lines: list) -> list[str]:
    "The one-step errors by problem, mean ± standard deviation over the seeds."
    from soflow_edu.dimensions import PROBLEMS

    heads = ["problem", *[line.label for line in lines]]
    found = [markdown_row(heads), "|---" * len(heads) + "|"]
    for name in PROBLEMS:
        cells = [name]
        for line in lines:
            values = line.errors.get(name, [])
            mean = number(statistics.mean(values)) if values else "-"
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(mean + spread)
        found.append(markdown_row(cells))
    return found


def growth_rows(rows: list[dict]) -> list[str]:
    "The slopes of the errors, as rows of Markdown."
    from soflow_edu.dimensions import growth

    found = ["| entry | dimension | modes | separation |", "|---|---|---|---|"]
    for name, (slopes, spread) in growth(rows).items():
        pairs = zip(slopes, spread, strict=True)
        cells = [f"{slope:.2f} ± {error:.2f}" for slope, error in pairs]
        found.append(markdown_row([name, *cells]))
    return found


GROWTH = (
    "Slopes of log error over the nine unlabelled mixtures, with standard errors of "
    "which the unit is the problem."
)


def standings_page(folder: Path = ROOT / "data/runs/dimensions") -> str:
    "The benchmark of chapter dimensions, made from the rows in a folder."
    from soflow_edu.dimensions import STEPS, standings, stored_rows

    path = chapters_with_modules()["dimensions"]
    text = STANDINGS.format(chapter=f"chapter {link_to(path)}", steps=STEPS)
    rows = stored_rows(folder)
    if not rows:
        return "\n".join([text, NO_ROWS, "", ADD_A_ROW])
    lines = standings(rows)
    parts = [text, *standing_rows(lines), ""]
    parts += ["## Problem by problem", "", *problem_rows(lines), ""]
    parts += ["## How errors grow", "", GROWTH, "", *growth_rows(rows), "", ADD_A_ROW]
    return "\n".join(parts)


# --------------------------------------------------------------------- other pages
def first_picture(path: Path) -> Notebook | None:
    "The data of the first figure of a chapter."
    for cell in book.code_cells(book.read(path)):
        for data in pictures(cell):
            return data
    return None


def gallery(folder: Path) -> str:
    "The first figure of each chapter, with its text, as links."
    (folder / "gallery").mkdir()
    lines = ["# Gallery", ""]
    for path in chapters():
        data = first_picture(path)
        if data is None:
            continue
        text = data["text/plain"]
        picture = folder / "gallery" / f"{path.stem}.png"
        picture.write_bytes(base64.b64decode(data["image/png"]))
        lines += [f"## {link_to(path)}", ""]
        lines += [f"![{text}](/gallery/{picture.name})", "", text, ""]
    return "\n".join(lines)


PLAY = (
    '<p><a href="4_practice/play.html">Drag the noise</a>: a page in which the trained '
    "map answers while you drag its input (chapter <i>play</i>).</p>"
)


def contents(caption: str, entries: list[str]) -> list[str]:
    "A part of the table of contents beside each page."
    options = [":hidden:", f":caption: {caption}"]
    return [":::{toctree}", *options, "", *entries, ":::", ""]


def front() -> str:
    """The first page: that of the repository, without links out of the site, and the
    contents."""
    text = book.readme().partition("-->")[2]
    text = re.sub(r"\]\(nbs/(pictures/)", r"](/\1", text)
    text = re.sub(r"\[([^\]]*)\]\((?:nbs/assignments/|[A-Z]+\.md)[^)]*\)", r"\1", text)
    text = re.sub(r"\]\((?:nbs|docs)/", "](/", text)
    lines = [text, "", PLAY, "", ""]
    for part, caption in PARTS.items():
        entries = [place(path) for path in chapters() if path.parent.name == part]
        lines += contents(caption, entries)
    others = ["related", "standings", "configurations", "equations", "gallery"]
    others.append("reference")
    lines += contents("To look things up", others)
    return "\n".join(lines)


# ------------------------------------------------------------------------- writing
def write_play(folder: Path):
    "The page of chapter play, beside it: what Sphinx copies as it is."
    from soflow_edu.cifar10 import load_weights
    from soflow_edu.distributions import law_of
    from soflow_edu.play import write_page

    (folder / "4_practice").mkdir(parents=True)
    model = load_weights("plane-labelled")
    write_page(folder / "4_practice/play.html", model, law_of("eight_gaussians"))


def write_chapters(folder: Path):
    places = places_by_name()
    for path in chapters():
        target = folder / f"{place(path)}.ipynb"
        target.parent.mkdir(exist_ok=True)
        nbformat.write(chapter(path, places), target)


def write_reference(folder: Path):
    (folder / "reference").mkdir()
    known = symbols()
    modules = chapters_with_modules()
    for module, path in modules.items():
        target = folder / f"reference/{module}.md"
        target.write_text(reference(module, path, known), encoding="utf-8")
    listing = reference_list(list(modules)) + "\n"
    (folder / "reference.md").write_text(listing, encoding="utf-8")


def write(folder: Path):
    "All pages, into a new folder, and into its folder _extra what is no page."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_chapters(folder)
    write_play(folder / "_extra")
    write_reference(folder)
    pages = {
        "index": front(),
        "related": related(),
        "configurations": configurations(),
        "equations": equation_page(),
        "standings": standings_page(),
        "gallery": gallery(folder),
    }
    shutil.copytree(ROOT / "nbs/pictures", folder / "pictures")
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
