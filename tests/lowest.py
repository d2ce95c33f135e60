"""Prints a constraints file of the lowest versions that settings.ini allows, or with
--tests the test files that need nothing but the package."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("requirements", "latents_requirements")
CHAPTERS = (
    "cli comparing config core distributions dit flow_matching guidance metrics "
    "objectives odes parity paths published sampling soflow solution toys unet"
).split()  # those whose tests take no minutes and import no tool of development


def lowest(requirement: str) -> str:
    "The first version that a requirement allows, as a constraint."
    found = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
    assert found, f"{requirement} in settings.ini states no lowest version"
    return f"{found[1]}=={found[2]}"


def constraints() -> list[str]:
    "A line for each requirement; that of torch stands in constraints.txt."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    lines = [" ".join(settings["DEFAULT"][key].split()) for key in KEYS]
    named = " ".join(lines).split()
    fixed = (ROOT / "constraints.txt").read_text(encoding="utf-8").strip()
    return [*(lowest(name) for name in named if not name.startswith("torch>")), fixed]


def test_files() -> list[str]:
    "The tests of the chapters that stand in CHAPTERS, as far as there are any."
    paths = [ROOT / "tests" / f"test_{name}.py" for name in CHAPTERS]
    return [str(path.relative_to(ROOT)) for path in paths if path.exists()]


if __name__ == "__main__":
    asked = "--tests" in sys.argv
    print(*(test_files() if asked else constraints()), sep=" " if asked else "\n")
