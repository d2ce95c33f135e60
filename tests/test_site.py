"The site as `make docs` built it: complete, readable everywhere, fetching nothing. And what its pages are made from."
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from test_browser import BROWSER, CHROMIUM, READY

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs/_build/site"
sys.path.insert(0, str(ROOT / "docs"))
import pages  # noqa: E402

needs_site = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="needs the built site: make docs")
CHAPTERS = [pages.place(path) for path in pages.chapters()]


# ------------------------------------------------------------------------------------- what it is made from
def test_every_equation_has_its_cell():
    text, rows = pages.equations(), [row for part in yaml.safe_load((pages.DOCS / "equations.yaml").read_text(encoding="utf-8")).values() for row in part]
    assert len(rows) > 30 and text.count("$$") == 2 * len(rows) and all(f"**{row['name']}**" in text for row in rows)
    assert len(re.findall(r"\(#cell-\w+\)", text)) == sum(len(row["symbols"]) for row in rows)


@pytest.mark.parametrize("symbols, named", [("[]", "none named"), ("[consistency.solution_lost]", "consistency.solution_lost")])
def test_an_equation_without_a_cell_stops_the_site(tmp_path, monkeypatch, symbols, named):
    (tmp_path / "equations.yaml").write_text(f"Losses:\n  - {{name: Lost, tex: x, symbols: {symbols}}}\n")
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    with pytest.raises(ValueError, match=f"Lost.*{named}"):
        pages.equations()


def test_reference_holds_every_exported_name_with_what_its_comments_say():
    known = pages.symbols()
    for path in pages.chapters():
        if module := pages.module_of(pages.book.read(path)):
            text = pages.reference(module, path, known)
            assert all(f"## {name.split('.')[1]}\n" in text for name, (place, _) in known.items() if place == path and "._" not in name)
    text = pages.reference("comparing", next(path for path in pages.chapters() if path.stem == "07_comparing"), known)
    assert "| `x1`, `y` | noise (B, ...) and labels (B,)" in text and "| in and out | (n, ...), (n, ...) |" in text and "Raises InputError for an unknown metric" in text
    assert pages.parameters(lambda: None) == [] and "| `count` | how many |" in pages.parameters(decorated)


@contextmanager
def decorated(law,
              count: int = 3):   # how many
    yield law


def test_names_of_chapters_become_links():
    places = {"solution": "1_plane/06_solution.ipynb", "flow matching": "1_plane/05_flow_matching.ipynb"}
    one, two, bare = "[*solution*](/1_plane/06_solution.ipynb)", "[*flow_matching*](/1_plane/05_flow_matching.ipynb)", "*nowhere*"
    assert pages.linked("See chapters *flow_matching*, *nowhere* and *solution*, not *solution*.", places) == f"See chapters {two}, {bare} and {one}, not *solution*."
    assert pages.linked("(chapter *solution*) [a](../1_plane/06_solution.ipynb)", places) == f"(chapter {one}) [a](/1_plane/06_solution.ipynb)"


def test_chapters_link_each_other_and_fold_solutions():
    path = next(path for path in pages.chapters() if path.stem == "08_consistency")
    made = pages.chapter(path, {"training": "1_plane/12_training.ipynb"})
    prose = "\n".join(cell.source for cell in made.cells if cell.cell_type == "markdown")
    assert re.search(r"[Cc]hapter \[\*training\*\]\(/1_plane/12_training.ipynb\)", prose)
    assert sum("hide-cell" in cell.metadata.get("tags", []) for cell in made.cells) == 3
    assert not any(line.startswith("#|") for cell in made.cells if cell.cell_type == "code" for line in cell.source.splitlines())
    figures = [cell for cell in made.cells if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    assert figures and all(len(cell.metadata.mystnb.image.alt) > 20 for cell in figures)


# ------------------------------------------------------------------------------------- what was built
class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids, self.pictures, self.fetched = [], set(), [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.pictures.append(given.get("alt") or "")
        self.fetched += [given[name] for name in ("src", "srcset") if given.get(name)] + ([given["href"]] if tag == "link" and given.get("rel") not in ("search", "index", "next", "prev") and given.get("href") else [])


def read(path):
    parser = Links()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


@needs_site
def test_all_pages_are_there_with_texts_for_pictures_and_whole_links():
    built = {path.relative_to(SITE).as_posix(): read(path) for path in SITE.rglob("*.html") if "_static" not in path.parts and path != SITE / "4_practice/play.html"}
    modules = [module for path in pages.chapters() if (module := pages.module_of(pages.book.read(path)))]
    assert {*(f"{chapter}.html" for chapter in CHAPTERS), *(f"reference/{module}.html" for module in modules), "index.html", "equations.html", "configurations.html", "gallery.html", "search.html"} <= built.keys()
    for name, page in built.items():
        assert all(len(alt) > 5 for alt in page.pictures), f"{name}: a picture without a text"
        assert str(ROOT) not in (SITE / name).read_text(encoding="utf-8"), f"{name} names a path of this machine"
        assert not [link for link in page.fetched if re.match(r"(https?:)?//", link)], f"{name} fetches from elsewhere"
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            place = (SITE / name).parent / target if target else SITE / name
            assert place.exists(), f"{name} links to {link}"
            other = os.path.relpath(place.resolve(), SITE.resolve())
            assert not anchor or other not in built or anchor in built[other].ids, f"{name}: {link} leads to no place"
    assert sum(len(page.pictures) for page in built.values()) > 100
    assert (SITE / "4_practice/play.html").stat().st_size > 4e6


@needs_site
@pytest.mark.skipif(not READY, reason="needs node, chromium and playwright-core: make browser")
def test_pages_are_readable_wide_and_narrow_light_and_dark():
    chosen = ["index.html", "1_plane/08_consistency.html", "2_images/04_cifar10.html", "4_practice/03_play.html", "reference/consistency.html", "equations.html", "configurations.html", "gallery.html"]
    settings = {"folder": SITE.as_uri(), "chromium": CHROMIUM, "pages": chosen, "shots": os.environ.get("SOFLOW_SHOTS", "")}
    done = subprocess.run(["node", str(BROWSER / "site.mjs"), json.dumps(settings)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert not seen["requests"] and not seen["errors"]
    assert any("08_consistency" in link for link in seen["found"])
    shade = lambda colour: sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / 3
    for name, looks in seen["pages"].items():
        for look, page in looks.items():
            assert page["overflow"] <= 0, f"{name} is wider than the window ({look})"
            assert page["raw"] == 0, f"{name}: {page['raw']} formulas are not set ({look})"
            assert all(width for _, width in page["images"]), f"{name}: a picture did not load"
            dark = look.endswith("dark")
            assert (shade(page["ground"]) < 60) == dark and (shade(page["ink"]) > 150) == dark, f"{name}: {page['ground']} and {page['ink']} ({look})"
    assert seen["pages"]["1_plane/08_consistency.html"]["wide-light"]["maths"] > 50
