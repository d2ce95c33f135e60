"""The site as `make docs` built it: complete, readable everywhere, fetching nothing.
And what its pages are made from."""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import import_module

import pytest
import yaml

import equations
import pages  # noqa: E402
from helpers import ROOT
from test_browser import CHROMIUM, READY, driven

SITE = ROOT / "docs" / "_build" / "site"
CHAPTERS = [pages.place(path) for path in pages.chapters()]
MODULES = pages.chapters_with_modules()

needs_site = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="needs the built site: make docs"
)
needs_browser = pytest.mark.skipif(
    not READY, reason="needs node, chromium and playwright-core: make browser"
)


def chapter_named(name: str):
    "The path of a chapter, by its name without its number."
    return next(path for path in pages.chapters() if path.stem[3:] == name)


# ------------------------------------------------------------------- the equations
def test_every_equation_has_its_cell():
    missing = pages.unlisted(equations.listed())
    assert not missing, f"no row in docs/equations.yaml: {', '.join(missing)}"
    text = pages.equation_page()
    rows = equations.listed()
    assert len(rows) > 30
    blocks = text.count("$$") // 2 + text.count(r"\begin{equation*}")
    assert blocks == len(rows)
    for number, row in rows.items():
        assert f"**{row['name']}**: {row['source']}\n" in text
        assert f"\\tag{{{number}}}" in text
    links = re.findall(r"\(#cell-\w+\)", text)
    assert len(links) == sum(len(row["symbols"]) for row in rows.values())


def test_equations_stand_below_their_chapter():
    text = pages.equation_page()
    below = text.partition("/1_plane/08_consistency.ipynb)\n")[2]
    assert "Solution consistency loss" in below.partition("\n## ")[0]


def first_equation() -> equations.Equation:
    return equations.displayed(chapter_named("consistency"))[0]


@pytest.mark.parametrize(
    "symbols, named",
    [
        ([], "none named"),
        (["consistency.solution_lost"], "consistency.solution_lost"),
    ],
)
def test_equation_without_cell_stops_the_site(tmp_path, monkeypatch, symbols, named):
    rows = equations.listed()
    rows[first_equation().number] |= {"name": "Lost", "symbols": symbols}
    (tmp_path / "equations.yaml").write_text(yaml.safe_dump(rows))
    monkeypatch.setattr(equations, "LIST", tmp_path / "equations.yaml")
    with pytest.raises(ValueError, match=f"Lost.*{named}"):
        pages.equation_page()


def test_an_equation_without_a_row_stops_the_site(monkeypatch):
    rows = equations.listed()
    number = first_equation().number
    del rows[number]
    monkeypatch.setattr(equations, "listed", lambda: rows)
    with pytest.raises(ValueError, match=f"no row for: .*{re.escape(number)}"):
        pages.equation_page()


# ---------------------------------------------------------------- related work
RELATED = (ROOT / "docs/related.md").read_text(encoding="utf-8")


OF_FAMILY = {  # classes that chapter family exports
    "AlphaFlow",
    "EasyConsistency",
    "ImprovedMeanFlow",
    "Lagrangian",
    "LagrangianSteps",
    "Midway",
}


def table_below(heading: str) -> list[list[str]]:
    "The cells of the first table below a heading, without its head."
    part = RELATED.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [re.split(r" +\| +", line.strip("| ")) for line in lines[2:]]


def test_every_method_of_the_table_has_its_paragraph():
    rows = table_below("The methods in a table")
    assert len(rows) == 26 and {len(row) for row in rows} == {9}
    leads = re.findall(r"^\| \[.+?\]\(#([\w-]+)\)", RELATED, flags=re.M)
    headings = re.findall(r"^### (.+)$", RELATED, flags=re.M)
    slugs = [heading.lower().replace(" ", "-") for heading in headings]
    assert len(leads) == len(rows) and set(leads) == set(slugs)


def test_every_paper_is_in_the_list_of_references():
    text, _, listed = RELATED.partition("## References")
    number = r"\b\d{4}\.\d{5}\b"
    named = set(re.findall(number, text))
    referred = re.findall(r"arXiv:(\d{4}\.\d{5})", listed)
    assert len(referred) == len(set(referred)) and len(referred) > 20
    assert named <= set(referred)
    for shown, led_to in re.findall(
        r"\[([\d.]+)\]\(https://arxiv.org/abs/(.+?)\)", text
    ):
        assert shown == led_to
    for row in table_below("The methods in a table"):
        year = re.search(r"\[(\d\d)\d\d\.", row[2])
        assert not year or row[1] == f"20{year[1]}", row[0]


def test_every_class_of_the_table_is_in_the_library(known):
    rows = table_below("The methods in a table")
    named = set(re.findall(r"`([A-Z]\w+)`", " ".join(row[-1] for row in rows)))
    exported = {name.partition(".")[2] for name in known}
    without = set() if "family" in MODULES else OF_FAMILY
    assert named - exported == without
    text = pages.related()
    assert len(re.findall(r"\[`\w+`\]\(#cell-\w+\)", text)) >= len(named)
    assert "(/1_plane/13_objectives.ipynb)" in text and "../" not in text


def expected_of(name: str) -> dict[int, dict]:
    "The published bands of a configuration, by the number of steps."
    path = ROOT / f"soflow_edu/configs/{name}.yaml"
    about = yaml.safe_load(path.read_text(encoding="utf-8"))["about"]
    return {band["options"]["steps"]: band for band in about["expected"]}


@pytest.mark.parametrize(
    "name, column", [("cifar10-published", 1), ("imagenet-xl2", 3)]
)
def test_published_numbers_lie_in_the_bands_of_the_configurations(name, column):
    rows = {row[0]: row for row in table_below("Published numbers")}
    bands = expected_of(name)
    for steps in (1, 2):
        number = float(rows["SoFlow, XL/2"][column + steps - 1])
        assert bands[steps]["low"] < number < bands[steps]["high"]


# ------------------------------------------------------------------- the reference
@contextmanager
def decorated(
    law,
    count: int = 3,  # how many
    *,
    noise: dict[str, int],  # by name
):  # pictures
    yield law


def in_one_line(x):  # (n, ...) -> (n, ...)
    return x


@pytest.fixture(scope="module")
def known() -> pages.Places:
    "Where each exported name is explained."
    return pages.symbols()


@pytest.mark.parametrize("module", MODULES)
def test_reference_holds_the_public_names_and_no_others(module, known):
    text = pages.reference(module, MODULES[module], known)
    public = import_module(f"soflow_edu.{module}").__all__
    assert re.findall(r"^## (\w+)$", text, flags=re.M) == public


def test_cells_of_all_exported_names_have_anchors(known):
    assert "soflow.difference_quotient" in known  # exported, and not public
    public = import_module("soflow_edu.soflow").__all__
    assert "difference_quotient" not in public
    path, cell = known["soflow.difference_quotient"]
    made = pages.chapter(path, {})
    assert f"(cell-{cell})=" in [cell.source for cell in made.cells]


def test_reference_says_what_comments_say(known):
    text = pages.reference("comparing", MODULES["comparing"], known)
    assert "| `x1` | noise (B, ...); drawn by fresh_noise if not given |" in text
    assert "| `y` | labels (B,) |" in text
    assert "Raises InputError for an unknown metric" in text


def test_tables_of_parameters():
    assert pages.parameters(lambda: None) == []
    table = pages.parameters(decorated)
    assert table[2:5] == [
        "| `count` | how many |",
        "| `noise` | by name |",
        "| returns | pictures |",
    ]
    assert "| in and out | (n, ...) -> (n, ...) |" in pages.parameters(in_one_line)


def test_long_signatures_have_a_line_a_parameter():
    def short(x: int = 0, *, y: int) -> int:
        return x + y

    def long(
        first: str,
        second: str = "a long text as a default",
        *,
        third: dict[str, int],
        fourth: int | None = None,
    ) -> str:
        return first

    assert pages.signature("short", short) == "short(x: int = 0, *, y: int) -> int"
    lines = pages.signature("long", long).splitlines()
    assert lines[0] == "long("
    assert lines[3:] == [
        "    *,",
        "    third: dict[str, int],",
        "    fourth: int | None = None,",
        ") -> str",
    ]


# -------------------------------------------------------------------- the chapters
def test_names_of_chapters_become_links():
    places = {
        "solution": "1_plane/06_solution.ipynb",
        "flow matching": "1_plane/05_flow_matching.ipynb",
    }
    one = "[*solution*](/1_plane/06_solution.ipynb)"
    two = "[*flow_matching*](/1_plane/05_flow_matching.ipynb)"
    prose = "See chapters *flow_matching*, *nowhere* and *solution*, not *solution*."
    expected = f"See chapters {two}, *nowhere* and {one}, not *solution*."
    assert pages.linked(prose, places) == expected
    prose = "(chapter *solution*) [a](../1_plane/06_solution.ipynb)"
    expected = f"(chapter {one}) [a](/1_plane/06_solution.ipynb)"
    assert pages.linked(prose, places) == expected


def test_formulas_of_several_lines_keep_their_tags():
    "Sphinx puts them into `split`, where MathJax takes no tag."
    one = r"$$x = y \tag{1.8.1}$$"
    bare = r"$$\begin{cases}x \\ y\end{cases}$$"
    formula = r"\begin{cases}x \\ y\end{cases} \tag{1.8.2}"
    made = pages.with_tags(f"{one}\n\n{bare}\n\n$${formula}$$\n")
    environment = f"\\begin{{equation*}}\n{formula}\n\\end{{equation*}}"
    assert made == f"{one}\n\n{bare}\n\n{environment}\n"


def test_chapters_link_each_other_and_fold_solutions():
    places = {"training": "1_plane/12_training.ipynb"}
    made = pages.chapter(chapter_named("consistency"), places)
    texts = [cell.source for cell in made.cells if cell.cell_type == "markdown"]
    link = r"[Cc]hapter \[\*training\*\]\(/1_plane/12_training.ipynb\)"
    assert re.search(link, "\n".join(texts))
    folded = ["hide-cell" in cell.metadata.get("tags", []) for cell in made.cells]
    assert sum(folded) == 3


def test_chapters_show_no_directives_and_describe_figures():
    made = pages.chapter(chapter_named("consistency"), {})
    codes = [cell for cell in made.cells if cell.cell_type == "code"]
    for cell in codes:
        assert not re.search(r"^#\|", cell.source, flags=re.M)
    figures = [cell for cell in codes if pages.pictures(cell)]
    assert figures
    for cell in figures:
        assert len(cell.metadata.mystnb.image.alt) > 20


# ------------------------------------------------------------------ what was built
SEARCHES = ("search", "index", "next", "prev")  # kinds of link that fetch nothing


@dataclass
class Page(HTMLParser):
    "What a page leads to, holds and fetches."

    links: list[str] = field(default_factory=list)
    ids: set[str | None] = field(default_factory=set)
    pictures: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        address = given.get("href")
        self.ids.add(given.get("id"))
        if tag == "a" and address:
            self.links.append(address)
        if tag == "img":
            self.pictures.append(given.get("alt") or "")
        sources = [given.get("src"), given.get("srcset")]
        if tag == "link" and given.get("rel") not in SEARCHES:
            sources.append(address)
        self.fetched += filter(None, sources)


@pytest.fixture(scope="module")
def built() -> dict[str, Page]:
    "All pages that Sphinx made, by their places."
    found = {}
    for path in SITE.rglob("*.html"):
        place = path.relative_to(SITE).as_posix()
        if "_static" in path.parts or place == "4_practice/play.html":
            continue
        found[place] = Page()
        found[place].feed(path.read_text(encoding="utf-8"))
    return found


@needs_site
def test_all_pages_are_there(built):
    names = ["index", "related", "standings", "equations", "configurations"]
    names += ["gallery", "search"]
    names += CHAPTERS
    names += [f"reference/{module}" for module in MODULES]
    assert {f"{name}.html" for name in names} <= built.keys()
    assert (SITE / "4_practice/play.html").stat().st_size > 4e6


@needs_site
def test_pictures_have_texts(built):
    assert sum(len(page.pictures) for page in built.values()) > 100
    for name, page in built.items():
        short = [alt for alt in page.pictures if len(alt) <= 5]
        assert not short, f"{name}: a picture without a text"


@needs_site
def test_pages_name_no_path_and_fetch_nothing(built):
    for name, page in built.items():
        text = (SITE / name).read_text(encoding="utf-8")
        assert str(ROOT) not in text, f"{name} names a path of this machine"
        elsewhere = [link for link in page.fetched if re.match(r"(https?:)?//", link)]
        assert not elsewhere, f"{name} fetches from elsewhere"


@needs_site
def test_links_are_whole(built):
    for name, page in built.items():
        inner = [link for link in page.links if not re.match(r"\w+:", link)]
        for link in inner:
            target, _, anchor = link.partition("#")
            path = SITE / name
            if target:
                path = path.parent / target
            assert path.exists(), f"{name} links to {link}"
            other = built.get(os.path.relpath(path.resolve(), SITE.resolve()))
            if anchor and other:
                assert anchor in other.ids, f"{name}: {link} leads to no place"


# ------------------------------------------------------------------- in a browser
LOOKED_AT = [
    "index.html",
    "1_plane/08_consistency.html",
    "2_images/04_cifar10.html",
    "4_practice/03_play.html",
    "reference/consistency.html",
    "related.html",
    "equations.html",
    "configurations.html",
    "gallery.html",
]


def shade(colour: str) -> float:
    "How light a colour is, from 0 to 255."
    parts = re.findall(r"[\d.]+", colour)[:3]
    return sum(float(part) for part in parts) / 3


def check_look(page: dict, dark: bool, where: str):
    assert page["overflow"] <= 0, f"{where}: wider than the window"
    assert page["raw"] == 0, f"{where}: {page['raw']} formulas are not set"
    assert not page["wrong"], f"{where}: formulas with errors: {page['wrong']}"
    assert page["cut"] == 0, f"{where}: {page['cut']} formulas cannot be scrolled"
    for alt, width in page["images"]:
        assert width, f"{where}: a picture did not load: {alt}"
    colours = f"{where}: {page['ground']} and {page['ink']}"
    assert (shade(page["ground"]) < 60) == dark, colours
    assert (shade(page["ink"]) > 150) == dark, colours


@needs_site
@needs_browser
@pytest.mark.slow
def test_pages_are_readable_wide_and_narrow_light_and_dark():
    seen = driven(
        "site.mjs",
        folder=SITE.as_uri(),
        chromium=CHROMIUM,
        pages=LOOKED_AT,
        shots=os.environ.get("SOFLOW_SHOTS", ""),
    )
    assert not seen["requests"]
    assert not seen["errors"]
    assert any("09_soflow" in link for link in seen["found"])
    for name, looks in seen["pages"].items():
        for look, page in looks.items():
            check_look(page, look.endswith("dark"), f"{name} ({look})")
    page = seen["pages"]["1_plane/08_consistency.html"]["wide-light"]
    assert page["maths"] > 50
    displayed = equations.displayed(chapter_named("consistency"))
    assert page["numbers"] == [equation.number for equation in displayed]


@needs_site
@needs_browser
@pytest.mark.slow
def test_code_and_output_of_chapters_fit_their_column():
    names = [f"{chapter}.html" for chapter in CHAPTERS]
    seen = driven("columns.mjs", folder=SITE.as_uri(), chromium=CHROMIUM, pages=names)
    assert min(page["blocks"] for page in seen.values()) > 0
    smallest = min(page["smallest"] for page in seen.values())
    assert smallest >= 12, f"code in letters of {smallest} pixels"
    lines = []
    for name, page in seen.items():
        lines += [f"{name}: {block}" for block in page["wide"]]
    assert not lines, "\n".join(["wider than the column at 1,400 pixels:", *lines])
