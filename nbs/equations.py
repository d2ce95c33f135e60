"""The equations of the course: their numbers, the lines of code that name them, and the
list in docs/equations.yaml.

A displayed equation that code implements ends in `\\tag{1.8.3}`: part, chapter, place
in the chapter. The code says `eq. 1.8.3` beside the line, and docs/equations.yaml says
what it is called, where it comes from, and which symbols implement it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "docs" / "equations.yaml"
# 1.8.3 or, until `python nbs/book.py number` has run, consistency.3
NUMBER = r"(?:\d+\.\d+\.\d+|[a-z]\w*\.\d+)"
DISPLAYED = re.compile(r"\$\$(.+?)\\tag\{(" + NUMBER + r")\}\s*\$\$", re.S)


@dataclass
class Equation:
    "A displayed equation of a chapter."

    number: str
    tex: str
    chapter: Path


def markdown_of(path: Path) -> Iterator[str]:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])


def displayed(path: Path) -> list[Equation]:
    "The numbered equations of a notebook, in order."
    found = []
    for text in markdown_of(path):
        for block in re.findall(r"\$\$.+?\$\$", text, re.S):
            match = DISPLAYED.fullmatch(block)
            if match:
                found.append(Equation(match[2], match[1].strip(), path))
    return found


def named_in(code: str) -> set[str]:
    "The numbers that code names: `eq. 1.8.3`, `(eq. 1.8.1 and 1.8.2)`."
    found = set()
    for words in re.findall(rf"\beqs?\. ({NUMBER}(?:(?:, | and ){NUMBER})*)", code):
        found |= set(re.findall(NUMBER, words))
    return found


def listed() -> dict[str, dict]:
    "docs/equations.yaml: number -> name, source, symbols."
    return yaml.safe_load(LIST.read_text(encoding="utf-8"))


def wanted_number(path: Path, place: int) -> str:
    "The number of an equation from where it stands: part, chapter, place."
    part = path.parent.name.split("_")[0]
    chapter = int(path.stem.split("_")[0])
    return f"{part}.{chapter}.{place}"


def new_numbers(chapters: list[Path]) -> dict[str, str]:
    "The number that each equation should have, by the one that it has."
    found = {}
    for path in chapters:
        for place, equation in enumerate(displayed(path), 1):
            found[equation.number] = wanted_number(path, place)
    return found


def renumbered(text: str, numbers: dict[str, str]) -> str:
    "A text in which tags, comments and references have their new numbers."

    def new(match: re.Match) -> str:
        return numbers.get(match[0], match[0])

    def all_new(match: re.Match) -> str:
        return re.sub(NUMBER, new, match[0])

    several = rf"{NUMBER}\)?(?:(?:,? (?:and |to )?)\(?{NUMBER}\)?)*"
    contexts = rf"\\+tag\{{{NUMBER}\}}|\b[Ee]q(?:uation)?s?\.? \(?{several}"
    return re.sub(contexts, all_new, text)


def renumber(chapters: list[Path]):
    "Gives every equation its number, in chapters and in the list."
    numbers = new_numbers(chapters)
    for path in chapters:
        text = path.read_text(encoding="utf-8")
        path.write_text(renumbered(text, numbers), encoding="utf-8")
    rows = {numbers.get(number, number): row for number, row in listed().items()}
    ordered = sorted(rows.items(), key=lambda item: key_of(item[0]))
    text = yaml.safe_dump(dict(ordered), allow_unicode=True, sort_keys=False, width=88)
    LIST.write_text(text, encoding="utf-8")


def key_of(number: str) -> list[int]:
    parts = number.split(".")
    return [int(part) if part.isdigit() else 99 for part in parts]


def code_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def module_code(symbol: str) -> str:
    module = symbol.partition(".")[0]
    return (ROOT / "soflow_edu" / f"{module}.py").read_text(encoding="utf-8")


def faults(chapters: list[Path]) -> list[str]:
    "What does not fit between the chapters, the code and the list."
    tagged: dict[str, Equation] = {}
    for path in chapters:
        tagged |= {equation.number: equation for equation in displayed(path)}
    rows = listed()
    missing = tagged.keys() - rows.keys()
    lost = rows.keys() - tagged.keys()
    found = [f"{number} has no row in {LIST.name}" for number in missing]
    found += [f"{number} stands in no chapter" for number in lost]
    for number in tagged.keys() & rows.keys():
        found += row_faults(tagged[number], rows[number])
    return sorted(found)


def row_faults(equation: Equation, row: dict) -> list[str]:
    "What is wrong with one row: symbols that do not exist, or code without the number."
    found = []
    named = named_in(code_of(equation.chapter))
    for symbol in row.get("symbols") or []:
        code = module_code(symbol)
        named |= named_in(code)
        name = symbol.partition(".")[2]
        if not re.search(rf"^(?:class|def) {name}\b|^{name}\b", code, re.M):
            found.append(f"{equation.number}: {symbol} does not exist")
    if equation.number not in named:
        found.append(f"{equation.number} is named beside no line of code")
    return found
