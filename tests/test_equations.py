"""Equations have one number each: in their chapter, in the code, and in the list of
docs/equations.yaml."""

import re
from importlib import import_module

import pytest

import book
import equations
from helpers import ROOT

CHAPTERS = [path for path in book.notebooks() if path.parent.name[0].isdigit()]
ROWS = equations.listed()


def displayed() -> list[equations.Equation]:
    "All numbered equations, in reading order."
    found = []
    for path in CHAPTERS:
        found += equations.displayed(path)
    return found


DISPLAYED = displayed()


def numbers() -> list[str]:
    return [equation.number for equation in DISPLAYED]


def module_code(module: str) -> str:
    path = ROOT / "soflow_edu" / f"{module}.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def code_of(equation: equations.Equation) -> str:
    "The code of its chapter, and of the modules of its symbols."
    symbols = ROWS.get(equation.number, {}).get("symbols", [])
    modules = {symbol.partition(".")[0] for symbol in symbols}
    parts = [module_code(module) for module in modules]
    return "\n".join([equations.code_of(equation.chapter), *parts])


# --------------------------------------------------------------- chapters and the list
def test_each_number_stands_once():
    assert len(numbers()) == len(set(numbers()))
    assert len(numbers()) > 30


def test_every_displayed_tag_is_a_number():
    "A tag that `equations.displayed` does not see would be in no list."
    for path in CHAPTERS:
        text = "\n".join(equations.markdown_of(path))
        tags = re.findall(r"\\tag\{([^}]*)\}", text)
        seen = [equation.number for equation in equations.displayed(path)]
        assert tags == seen, path.name


def test_every_tag_has_a_row():
    missing = [number for number in numbers() if number not in ROWS]
    assert not missing, f"no row in docs/equations.yaml: {', '.join(missing)}"


def test_every_row_has_a_tag():
    lost = sorted(ROWS.keys() - set(numbers()))
    assert not lost, f"no chapter has the tags {', '.join(lost)}"


@pytest.mark.parametrize("number", ROWS)
def test_rows_are_whole(number):
    row = ROWS[number]
    assert list(row) == ["name", "source", "symbols"]
    assert row["name"]
    assert row["source"]
    assert row["symbols"]


def test_names_differ():
    names = [row["name"] for row in ROWS.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("number", ROWS)
def test_symbols_exist(number):
    for symbol in ROWS[number]["symbols"]:
        module, _, name = symbol.partition(".")
        assert hasattr(import_module(f"soflow_edu.{module}"), name), symbol


# ------------------------------------------------------------------------- in the code
def test_code_names_every_equation():
    "In its chapter, or in the module of one of its symbols."
    unnamed = []
    for equation in DISPLAYED:
        if equation.number not in equations.named_in(code_of(equation)):
            unnamed.append(equation.number)
    assert not unnamed, f"no code says eq. {', '.join(unnamed)}"


def test_code_names_no_other_equation():
    for path in sorted((ROOT / "soflow_edu").glob("*.py")):
        unknown = equations.named_in(module_code(path.stem)) - set(numbers())
        assert not unknown, f"{path.name}: no chapter has {', '.join(unknown)}"


# ------------------------------------------------------------------------------ numbers
def test_numbers_say_where_an_equation_stands():
    changed = {
        old: new for old, new in equations.new_numbers(CHAPTERS).items() if old != new
    }
    advice = "run `python nbs/book.py number`, then `make export`"
    assert not changed, f"{advice}: {changed}"


TEXT = r"""$$x = y \tag{a.3}$$
"$$x = z \\tag{a.1}$$"
x = y  # eq. a.3
"The mean (eq. a.1 and a.2)." With a.3 and version 1.2.3 as they are.
Equation (a.4), equations a.1 to a.3, and eq. b.1."""
RENUMBERED = r"""$$x = y \tag{1.8.3}$$
"$$x = z \\tag{1.8.1}$$"
x = y  # eq. 1.8.3
"The mean (eq. 1.8.1 and 1.8.2)." With a.3 and version 1.2.3 as they are.
Equation (1.8.4), equations 1.8.1 to 1.8.3, and eq. b.1."""


def test_a_text_gets_new_numbers():
    new = {f"a.{place}": f"1.8.{place}" for place in range(1, 5)}
    assert equations.renumbered(TEXT, new) == RENUMBERED
    assert equations.renumbered(RENUMBERED, new) == RENUMBERED
    assert equations.renumbered("equation (a.4)", new) == "equation (1.8.4)"


def test_numbers_move_at_once():
    "Where an equation comes in before another, neither number is taken for the other."
    new = {"1.8.1": "1.8.2", "1.8.2": "1.8.3"}
    text = "eq. 1.8.1 and eq. 1.8.2"
    assert equations.renumbered(text, new) == "eq. 1.8.2 and eq. 1.8.3"


def test_code_that_names_equations():
    code = "x = y  # eq. 1.8.3\n'(eq. 1.8.1 and a.2)'\n'equations 1.9.1'"
    assert equations.named_in(code) == {"1.8.3", "1.8.1", "a.2"}
