"""The decks of the four weeks: pictures that are the chapters', ninety minutes with
notes, slides that fit, and nothing from a network."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import book
from helpers import ROOT
from test_browser import CHROMIUM, NEEDS, READY, driven

DECKS = sorted((ROOT / "nbs/slides").glob("week_*.ipynb"))
MOST_WORDS = 60  # on a slide
CALL = re.compile(r'figure\("([\w/]+)", "([\w-]+)"\)')
HAS_REVEAL = (ROOT / "docs/node_modules/reveal.js").exists()


def kind(cell) -> str:
    return cell.metadata.slideshow.slide_type


def slides(path: Path) -> list[list]:
    "The cells of each slide of a deck, without those that are skipped."
    found = []
    for cell in book.read(path).cells:
        if kind(cell) == "slide":
            found.append([])
        if kind(cell) != "skip":
            found[-1].append(cell)
    return found


def every_deck(test):
    return pytest.mark.parametrize("path", DECKS, ids=lambda path: path.stem)(test)


def test_each_week_of_the_unit_has_a_deck():
    guide = (ROOT / "nbs/assignments/instructors.md").read_text(encoding="utf-8")
    unit = guide.partition("## A unit of four weeks")[2].partition("\n## ")[0]
    weeks = re.findall(r"^\| (\d) \|", unit, flags=re.M)
    assert [path.stem for path in DECKS] == [f"week_{week}" for week in weeks]


@every_deck
def test_a_deck_fills_ninety_minutes_and_every_slide_has_notes(path):
    minutes = 0
    for slide in slides(path):
        notes = [cell.source for cell in slide if kind(cell) == "notes"]
        assert len(notes) == 1, slide[0].source
        said = re.match(r"\*\*(\d) minutes\.\*\* (.+)", notes[0])
        assert said and len(said[2].split()) >= 20, notes[0]
        minutes += int(said[1])
    assert minutes == 90 and 15 <= len(slides(path)) <= 25


def words(text: str) -> int:
    "The number of words on a slide; a formula counts as one."
    text = re.sub(r"\$\$?.+?\$\$?", " formula ", text, flags=re.S)
    return len(re.findall(r"\w[\w'-]*", text))


@every_deck
def test_a_slide_has_a_heading_and_few_words(path):
    for first, *others in slides(path):
        assert re.match(r"##? \S", first.source), first.source
        texts = [cell.source for cell in others if kind(cell) != "notes"]
        shown = [text for text in texts if not CALL.search(text)]
        assert words("\n".join([first.source, *shown])) <= MOST_WORDS, first.source


def png(outputs) -> list[str]:
    found = [output.data["image/png"] for output in outputs if "data" in output]
    return ["".join(data).strip() for data in found]


@every_deck
def test_pictures_are_those_of_the_chapters(path):
    shown = [cell for cell in book.read(path).cells if CALL.search(cell.source)]
    assert len(shown) >= 7
    for cell in shown:
        chapter, name = CALL.search(cell.source).groups()
        cells = book.read(ROOT / f"nbs/{chapter}.ipynb").cells
        (source,) = [found for found in cells if found.id == name]
        same = png(cell.outputs) == png(source.outputs)
        assert same, f"{chapter} has another figure: make notebooks NOTEBOOKS=slides"


# ------------------------------------------------------------------------ as built
class Addresses(HTMLParser):
    "What a page loads, and the texts of its pictures."

    def __init__(self):
        super().__init__()
        self.loads = []
        self.texts = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link":
            self.loads.append(given["href"])
        if tag == "img":
            self.texts.append(given["alt"])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Path]:
    "The folder that `make slides` fills."
    folder = tmp_path_factory.mktemp("decks")
    there = ["-o", ".venv/.installed", "-o", "docs/node_modules/.installed"]
    places = [f"DECKS={folder}", f"BIN={Path(sys.executable).parent}"]
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    subprocess.run(
        ["make", *there, "slides", *places],
        cwd=ROOT,
        check=True,
        env=os.environ | offline,
        capture_output=True,
    )
    yield folder


@pytest.mark.skipif(not HAS_REVEAL, reason=NEEDS)
def test_what_a_deck_loads_lies_beside_it(built):
    for path in DECKS:
        text = (built / f"{path.stem}.slides.html").read_text(encoding="utf-8")
        page = Addresses()
        page.feed(text)
        beside = [place for place in page.loads if not place.startswith("data:")]
        assert len(beside) >= 5
        assert all((built / place).is_file() for place in beside), beside
        styles = "\n".join(re.findall(r"<style.*?</style>", text, flags=re.S))
        assert not re.findall(r"url\(['\"]?http|@import", styles)
        assert page.texts and all(words.endswith(".") for words in page.texts)
        assert "figure(" not in text, "a slide shows code"


@pytest.mark.slow
@pytest.mark.skipif(not (READY and HAS_REVEAL), reason=NEEDS)
@every_deck
def test_every_slide_fits_and_nothing_is_fetched(path, built):
    page = built / f"{path.stem}.slides.html"
    shots = os.environ.get("SOFLOW_SHOTS", "")
    seen = driven("slides.mjs", url=page.as_uri(), chromium=CHROMIUM, shots=shots)
    assert not seen["errors"]
    for address in seen["loaded"]:
        assert address.startswith(("file:", "data:", "blob:")), address
    assert len(seen["slides"]) == len(slides(path))
    for slide in seen["slides"]:
        assert slide["low"] <= 1 and slide["right"] <= 1, slide
        assert not slide["raw"], f"{slide['title']}: a formula was not set"
        assert slide["notes"] > 80
