"""The house rules of the code, as counts and as a list of the places that break them.

Used by `python nbs/book.py measure` and `python nbs/book.py style`, and by the tests.
ruff checks lines, imports and complexity; this file checks what ruff has no rule for.
"""

import ast
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CODE_WIDTH = 88
OUTPUT_WIDTH = 100
MOST_STATEMENTS = 25
MEDIAN_STEPS = 6
MOST_EXPORTED_IN_A_ROW = 3
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CHECKS = ("assert", "refusal(", "show(", "print(", "display(")


@dataclass
class Cell:
    "A code cell, or a whole file of code."

    place: str
    source: str
    exported: bool = False

    def tree(self) -> ast.Module:
        return ast.parse(without_magic(self.source))


@dataclass
class Finding:
    "A place that breaks a rule."

    place: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.place}:{self.line}: {self.rule}"


def without_magic(source: str) -> str:
    "Code without the lines that only IPython understands."
    lines = source.splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


# ------------------------------------------------------------------------ reading
def cells_of(path: Path, root: Path) -> list[Cell]:
    "The code cells of a notebook, or a Python file as one cell."
    place = path.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [Cell(place, text)]
    cells = []
    for number, cell in enumerate(json.loads(text)["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.strip():
            exported = source.startswith("#| export")
            cells.append(Cell(f"{place}[{number}]", source, exported))
    return cells


def printed_lines(path: Path) -> list[str]:
    "Every line of text among the stored outputs of a notebook."
    lines = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown = output.get(
                "text", [] if "image/png" in data else data.get("text/plain")
            )
            lines += "".join(shown or []).splitlines()
    return lines


def shown_lines(path: Path) -> Iterator[str]:
    "Every line of the blocks of code in the text of a notebook."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        inside = False
        for line in "".join(cell["source"]).splitlines():
            if line.startswith("```"):
                inside = not inside
            elif inside:
                yield line


def docstring_of(tree: ast.Module) -> str:
    return ast.get_docstring(tree) or ""


def public_names(package: Path) -> dict[str, list[str]]:
    "The modules that hold each public name."
    homes: dict[str, list[str]] = {}
    for path in sorted(package.glob("*.py")):
        if path.name == "__init__.py":  # where some stand again
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "__all__"
            ):
                for name in ast.literal_eval(node.value):
                    homes.setdefault(name, []).append(path.stem)
    return homes


# ------------------------------------------------------------------------ rules
def nested_conditional(node: ast.AST) -> bool:
    if not isinstance(node, ast.IfExp):
        return False
    inner = [child for child in ast.walk(node) if isinstance(child, ast.IfExp)]
    return len(inner) > 1


def bound_lambda(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)


def dense_comprehension(node: ast.AST) -> bool:
    if not isinstance(node, COMPREHENSIONS):
        return False
    conditions = sum(len(part.ifs) for part in node.generators)
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
    return len(node.generators) > 1 or conditions > 1 or len(inner) > 1


def joined_assignment(node: ast.AST) -> bool:
    "`a, b = c, d`, unless the right side uses what the left changes, as a swap does."
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return False
    changed = {ast.unparse(part) for part in target.elts}
    used = {ast.unparse(part) for part in ast.walk(node.value)}
    return not changed & used


RULES = {
    "a conditional expression inside another": nested_conditional,
    "a lambda bound to a name": bound_lambda,
    "a comprehension with two `for`, two `if` or one inside": dense_comprehension,
    "a tuple assigned to a tuple": joined_assignment,
}


def broken_rules(cell: Cell) -> Iterator[Finding]:
    "The places in a cell that break one of RULES."
    for node in ast.walk(cell.tree()):
        for rule, breaks in RULES.items():
            if breaks(node):
                yield Finding(cell.place, node.lineno, rule)


def statements(cell: Cell) -> int:
    "Statements of a cell, at all depths."
    return sum(isinstance(node, ast.stmt) for node in ast.walk(cell.tree()))


def is_free(node: ast.stmt) -> bool:
    "Imports and docstrings, which ask nothing of a reader."
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def steps(cell: Cell) -> int:
    "Statements of a cell without imports and docstrings."
    found = [node for node in ast.walk(cell.tree()) if isinstance(node, ast.stmt)]
    return sum(not is_free(node) for node in found)


def defines(cell: Cell) -> bool:
    "Whether an exported cell defines something, and is not only imports and constants."
    kinds = (ast.FunctionDef, ast.ClassDef)
    return cell.exported and any(isinstance(node, kinds) for node in cell.tree().body)


def checks(cell: Cell) -> bool:
    "Whether a cell checks or shows something."
    return not cell.exported and any(word in cell.source for word in CHECKS)


def followed(cells: list[Cell]) -> list[bool]:
    "For each exported definition, whether the next code cell checks or shows it."
    pairs = zip(cells, [*cells[1:], Cell("", "")], strict=True)
    return [checks(after) for cell, after in pairs if defines(cell)]


def unchecked_runs(cells: list[Cell]) -> Iterator[tuple[Cell, int]]:
    "Each exported cell, and how many stand in a row there without another between."
    run = 0
    for cell in cells:
        run = run + 1 if cell.exported else 0
        if cell.exported:
            yield cell, run


def longest_run(cells: list[Cell]) -> int:
    "The most exported cells in a row."
    return max((run for _, run in unchecked_runs(cells)), default=0)


def too_many_in_a_row(cells: list[Cell]) -> Iterator[Finding]:
    "Exported cells that come after three others."
    for cell, run in unchecked_runs(cells):
        if run > MOST_EXPORTED_IN_A_ROW:
            yield Finding(cell.place, 1, "more than three exported cells in a row")


def notebook_findings(path: Path, root: Path) -> Iterator[Finding]:
    "What a notebook breaks as a whole: sizes of cells, checks, printed lines."
    cells = cells_of(path, root)
    place = path.relative_to(root).as_posix()
    for cell in cells:
        size = statements(cell)
        if size > MOST_STATEMENTS:
            yield Finding(cell.place, 1, f"{size} statements in a cell")
    median = statistics.median([steps(cell) for cell in cells])
    if median > MEDIAN_STEPS:
        yield Finding(place, 0, f"a median of {median} statements a cell")
    yield from too_many_in_a_row(cells)
    for line in printed_lines(path):
        if len(line) > OUTPUT_WIDTH:
            yield Finding(place, 0, f"prints {len(line)} columns: {line[:60]} ...")
    for line in shown_lines(path):
        if len(line) > OUTPUT_WIDTH:
            yield Finding(place, 0, f"shows {len(line)} columns: {line[:60]} ...")


def long_lines(path: Path, root: Path) -> Iterator[Finding]:
    "Lines of a configuration that do not fit the page."
    place = path.relative_to(root).as_posix()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > CODE_WIDTH:
            yield Finding(place, number, f"{len(line)} columns")


def findings(path: Path, root: Path) -> list[Finding]:
    "All places of a file that break the rules of the house."
    if path.suffix == ".yaml":
        return list(long_lines(path, root))
    found = []
    for cell in cells_of(path, root):
        found += broken_rules(cell)
        for number, line in enumerate(cell.source.splitlines(), 1):
            if len(line) > CODE_WIDTH and not line.startswith("#|"):
                found.append(Finding(cell.place, number, f"{len(line)} columns"))
    if path.suffix == ".ipynb":
        found += notebook_findings(path, root)
    return found


def own_files(root: Path) -> list[Path]:
    "The files that the rules are for: notebooks, configurations, tests, tools."
    folders = ("nbs", "tests", "docs")
    files = [root / "setup.py"]
    files += sorted((root / "soflow_edu/configs").glob("*.yaml"))
    for folder in folders:
        for kind in ("*.ipynb", "*.py"):
            files += sorted((root / folder).rglob(kind))
    unwanted = {"node_modules", "_build", ".ipynb_checkpoints"}
    return [path for path in files if not unwanted & set(path.parts)]


def all_findings(root: Path, names: tuple[str, ...] = ()) -> list[Finding]:
    "What the files break whose path holds one of the names, or all files."
    found = []
    for path in own_files(root):
        place = path.relative_to(root).as_posix()
        if not names or any(name in place for name in names):
            found += findings(path, root)
    return found


def main(*names: str):
    "Prints what the named files break."
    for name in names:
        path = Path(name).resolve()
        for finding in findings(path, path.parent):
            print(finding)


if __name__ == "__main__":
    main(*sys.argv[1:])
