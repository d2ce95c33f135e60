"Every notebook runs, is committed as it ran, and can be read by everybody."

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import book
import digests
import house
from helpers import ROOT, cpu_seconds, program

NOTEBOOKS = book.notebooks()
ASSIGNMENTS = [path for path in NOTEBOOKS if path.parent.name == "assignments"]
CHAPTERS = [path for path in NOTEBOOKS if path.parent.name[0].isdigit()]
# What is executed at each `make test`, stale or not: of each part the shortest chapter.
ALWAYS = ("00_start", "11_config", "07_winograd", "02_latents", "03_play")
SECONDS = 900  # on a busy machine; a chapter takes less than two minutes on a quiet one


def place(path: Path) -> str:
    return str(path.relative_to(book.NOTEBOOKS))


def stems(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def every(paths: list[Path]):
    "A test for each of these notebooks."
    return pytest.mark.parametrize("path", paths, ids=[place(path) for path in paths])


def to_execute() -> list:
    "All notebooks; those whose outputs are known to be fresh wait for the slow tests."
    chosen = []
    for path in NOTEBOOKS:
        waits = path.stem not in ALWAYS and not book.staleness(path)
        marks = [pytest.mark.slow] if waits else []
        chosen.append(pytest.param(path, marks=marks, id=place(path)))
    return chosen


def outputs(path: Path) -> list:
    found = []
    for cell in book.code_cells(book.read(path)):
        found += cell.outputs
    return found


def pictures_of(cell) -> list:
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def pictures(path: Path) -> list:
    return [output for output in outputs(path) if "image/png" in output.get("data", {})]


def chapter(stem: str) -> Path:
    return next(path for path in CHAPTERS if path.stem == stem)


# ------------------------------------------------------------------------ they run
def test_there_are_notebooks():
    assert len(CHAPTERS) > 30 and len(ASSIGNMENTS) == 5
    assert set(ALWAYS) <= set(stems(NOTEBOOKS))


@pytest.mark.parametrize("path", to_execute())
def test_runs(path):
    done = program("nbdev-test", "--do-print", path, timeout=SECONDS, MPLBACKEND="agg")
    assert done.status == 0 and f"Completed {path}" in done.said, done.said[-4000:]


@every(NOTEBOOKS)
def test_outputs_are_those_of_this_code(path):
    why = book.staleness(path)
    assert not why, f"{path.name} {why}: run `make notebooks NOTEBOOKS={path.stem}`"


# ------------------------------------------------------------------------ their form
def test_no_line_of_code_or_output_breaks_a_rule_of_the_house():
    found = house.all_findings(ROOT)
    assert not found, "\n".join(str(finding) for finding in found)


@every(NOTEBOOKS)
def test_form(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1.5e6
    machine = re.search(r"/(?:home|root|work|Users|tmp)/[\w.]", text)
    assert not machine, "names a path of a machine"
    kinds = set()
    for output in outputs(path):
        kinds |= set(output.get("data", {}))
    live = any("widget" in kind for kind in kinds)
    assert not live, "holds a widget, which is dead without its kernel"
    for output in pictures(path):
        alt = output.data.get("text/plain", "")
        assert alt.endswith("."), "a figure has no sentence of alternative text"


def test_the_first_figure_of_the_course_comes_within_fifteen_seconds():
    "CPU seconds of a process that runs the first page up to its first figure."
    sources = book.sources(book.read(chapter("00_start")))
    first = [source.startswith("show(") or "\nshow(" in source for source in sources]
    until = sources[: first.index(True) + 1]
    assert "train(" not in "\n".join(until)
    assert cpu_seconds("-c", "\n".join(until)) < 15


def test_things_to_drag_are_five_cells_and_begin_with_a_widget():
    from soflow_edu import widgets

    cells = book.read(chapter("00_things_to_drag")).cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds == ["markdown", "code", "markdown", "code", "markdown"]
    for cell in book.code_cells(book.read(chapter("00_things_to_drag"))):
        builder = cell.source.splitlines()[-1].removesuffix("()")
        assert callable(getattr(widgets, builder))
        assert len(pictures_of(cell)) == 1, "nothing to see without a kernel"


@every(CHAPTERS)
def test_chapter_has_its_parts(path):
    notebook = book.read(path)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    prose = "\n".join(texts)
    assert prose.startswith("# ")
    for part in ("What this chapter promises", "un time:", "**Predict before you"):
        assert part in prose
    assert pictures(path), "no figure"


def solutions(path: Path) -> list[str]:
    "The code of each folded solution; cells with nothing between are one solution."
    found = []
    goes_on = False
    for cell in book.read(path).cells:
        is_solution = "solution" in book.tags(cell)
        if is_solution and goes_on:
            found[-1] += "\n" + cell.source
        elif is_solution:
            found.append(cell.source)
        goes_on = is_solution
    return found


# The first page has a self-test in the place of exercises. The second one is five cells
# to play with before any theory: what there is to do is dragged, not written.
WITHOUT_EXERCISES = ("00_start", "00_things_to_drag")


@every([path for path in CHAPTERS if path.stem not in WITHOUT_EXERCISES])
def test_chapter_ends_with_three_exercises_whose_solutions_check_themselves(path):
    assert len(solutions(path)) == 3
    for code in solutions(path):
        assert "assert" in code or "raise AssertionError" in code


ENDS = (
    "## What to take along",
    "## What comes next",
    "## Three questions to test yourself",
)


@every(CHAPTERS)
def test_chapter_ends_with_what_comes_next_and_three_questions(path):
    last = book.read(path).cells[-1]
    assert last.cell_type == "markdown"
    places = [last.source.find(part) for part in ENDS]
    assert -1 not in places and places == sorted(places)
    asked, folded, answers = last.source[places[-1] :].partition("<details>")
    assert folded and answers.endswith("</details>")
    for part in (asked, answers):
        assert re.findall(r"^(\d)\.", part, flags=re.M) == ["1", "2", "3"]


LINK = re.compile(r"\]\(([^)#\s]+\.ipynb)")
NAMED = re.compile(r"[Cc]hapters?(?:,? (?:and |or )?\*\w[\w -]*\*)+")


@every(CHAPTERS)
def test_chapters_named_in_prose_are_links_that_lead_somewhere(path):
    known = {other.stem[3:].replace("_", " ") for other in CHAPTERS}
    for cell in book.read(path).cells:
        if cell.cell_type != "markdown":
            continue
        for target in LINK.findall(cell.source):
            assert target.startswith("http") or (path.parent / target).exists(), target
        for words in NAMED.findall(cell.source):
            bare = {name.replace("_", " ") for name in re.findall(r"\*(.+?)\*", words)}
            assert not bare & known, f"no link: {words}"


GLOSSARY = re.compile(r"^- \*\*(.+?)\*\*(.+)$", flags=re.M)
# What must be explained to those who read chapters paths to objectives.
EXPLAINED = (
    "oracle",
    "score",
    "heun",
    "dopri5",
    "jvp",
    "vmap",
    "stop-gradient",
    "ema",
    "posterior",
    "semigroup",
    "grönwall",
    "adaln",
    "primal",
    "latent",
    "classifier-free",
    "bench",
    "stratified",
)


def glossary() -> list[tuple[str, str]]:
    "The entries of the first page, each a name and what is said of it."
    for cell in book.read(chapter("00_start")).cells:
        if cell.cell_type == "markdown" and "## Glossary" in cell.source:
            part = cell.source.partition("## Glossary")[2].partition("\n## ")[0]
            return GLOSSARY.findall(part)
    raise AssertionError("no glossary")


def test_glossary_goes_from_a_to_z_and_is_complete():
    keys = [name.strip("`").lower() for name, _ in glossary()]
    assert keys == sorted(keys) and len(keys) == len(set(keys))
    text = "\n".join(keys)
    missing = [word for word in EXPLAINED if word not in text]
    assert not missing


def test_glossary_leads_to_chapters_that_use_the_word():
    for name, says in glossary():
        targets = LINK.findall(says)
        assert targets, name
        words = [name.strip("`"), *name.strip("`").split(", ")]
        stem = words[-1].lower().removesuffix("'s method").removesuffix("s")
        for target in targets:
            path = chapter(Path(target).stem)
            text = "\n".join(cell.source for cell in book.read(path).cells)
            text = text.lower().replace("-", " ")
            assert stem.replace("-", " ") in text, f"{name}: {path.stem}"


@every(CHAPTERS)
def test_solutions_are_folded(path):
    for cell in book.read(path).cells:
        if "solution" in book.tags(cell):
            assert cell.metadata.jupyter.source_hidden
            assert cell.metadata.jupyter.outputs_hidden


@every([path for path in CHAPTERS if "default_exp" in path.read_text(encoding="utf-8")])
def test_module_begins_with_a_docstring(path):
    (name,) = re.findall(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8"))
    tree = digests.parsed(digests.module_text(name))
    docstring = house.docstring_of(tree)
    assert docstring.endswith(".") and len(docstring) > 30
    assert max(len(line) for line in docstring.splitlines()) <= house.OUTPUT_WIDTH


def test_no_public_name_is_in_two_modules():
    names = house.public_names(book.PACKAGE)
    twice = {name: homes for name, homes in names.items() if len(homes) > 1}
    assert not twice


def test_chapters_import_only_earlier_ones():
    seen = set()
    for path in CHAPTERS:
        sources = book.sources(book.read(path))
        parts = [part for part in sources if part.startswith("#| export")]
        late = digests.imported("\n".join(parts)) - seen
        assert not late, f"{path.name} exports code that imports {late}"
        code = "\n".join(sources)
        module = re.search(r"#\| default_exp (\w+)", code)
        if module:
            late = digests.imported(code) - seen - {module[1]}
            assert not late, f"{path.name} imports {late}, which come later"
            seen.add(module[1])


# ------------------------------------------------------------------------ assignments
OPENING = (
    "**You need**",
    "**Time:**",
    "**What you will be able to do afterwards**",
    "**How it works.**",
)


@every(ASSIGNMENTS)
def test_assignment_has_its_parts(path):
    from soflow_edu.grading import read_assignment

    assignment = read_assignment(path)
    notebook = book.read(path)
    opening = notebook.cells[0].source
    assert opening.startswith("# ") and all(words in opening for words in OPENING)
    assert sum(question.written for question in assignment.questions) >= 2
    assert pictures(path)
    attempts = [c for c in book.code_cells(notebook) if c.source.startswith("@attempt")]
    assert attempts, "nothing is drawn from the student's answers"
    assert "default_exp" not in path.read_text(encoding="utf-8")


def task_of(assignment, question) -> str:
    "The text of a question, from its heading to its answer."
    cells = assignment.cells
    heading = f"### Question {question.number}. "
    starts = [cell["source"].startswith(heading) for cell in cells]
    answers = [cell is question.answer for cell in cells]
    parts = cells[starts.index(True) : answers.index(True)]
    texts = [cell["source"] for cell in parts if cell["cell_type"] == "markdown"]
    return "\n".join(texts)


@every(ASSIGNMENTS)
def test_each_question_says_its_time_and_folds_its_hint(path):
    from soflow_edu.grading import read_assignment

    assignment = read_assignment(path)
    for question in assignment.questions:
        task = task_of(assignment, question)
        assert re.search(r"\(\d+ minutes\)", task), question.number
        if not question.written:
            assert "<details>" in task and "</details>" in task, question.number


@every(ASSIGNMENTS)
def test_each_code_question_has_three_wrong_answers_and_a_check(path):
    from soflow_edu.grading import read_assignment, role

    assignment = read_assignment(path)
    kinds = [role(cell) for cell in assignment.cells]
    for question in assignment.questions:
        if question.written:
            continue
        start = [cell is question.answer for cell in assignment.cells].index(True)
        tests = [cell is question.tests for cell in assignment.cells].index(True)
        between = assignment.cells[start + 1 : tests]
        named = rf'"Question {question.number}\b'
        assert any(re.search(named, cell["source"]) for cell in between)
        assert kinds[start - 3 : start] == ["wrong"] * 3


# ------------------------------------------------------------------------ digests
@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    "A copy of the package, which the digests are made to read."
    copy = tmp_path / "soflow_edu"
    shutil.copytree(book.PACKAGE, copy)
    monkeypatch.setattr(digests, "PACKAGE", copy)
    return copy


def digest_of(stem: str) -> str:
    return digests.digest(book.sources(book.read(chapter(stem))))


def append(path: Path, line: str):
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")


@pytest.mark.parametrize("module", ["solution", "core", "comparing"])
def test_digest_sees_a_change_in_what_is_imported(package, module):
    before = digest_of("07_comparing")
    append(package / f"{module}.py", "extra = 1")
    assert digest_of("07_comparing") != before


def test_digest_sees_a_change_in_what_is_only_named(package):
    before = digest_of("00_start")  # reaches its objective by name only
    append(package / "soflow.py", "extra = 1")
    assert digest_of("00_start") != before


def test_digest_sees_the_configurations_that_are_read_and_no_others(package):
    start = digest_of("00_start")
    ladder = digest_of("05_ladder")
    append(package / "configs/imagenet-laptop.yaml", "# another remark")
    assert digest_of("00_start") == start and digest_of("05_ladder") != ladder
    append(package / "configs/plane.yaml", "# another remark")
    assert digest_of("00_start") != start


def test_digest_sees_a_change_in_a_cell():
    sources = book.sources(book.read(chapter("07_comparing")))
    assert digests.digest([*sources, "1 + 1"]) != digests.digest(sources)


def test_one_new_entry_of_the_catalogue_makes_no_notebook_stale(package):
    stems = [path.stem for path in CHAPTERS]
    before = {stem: digest_of(stem) for stem in stems}
    catalogue = json.loads((package / "catalogue.json").read_text(encoding="utf-8"))
    catalogue["path"]["a_path_of_my_own"] = "paths"
    (package / "catalogue.json").write_text(json.dumps(catalogue), encoding="utf-8")
    changed = [stem for stem in stems if digest_of(stem) != before[stem]]
    listing = [stem for stem in changed if 'names("path")' not in source_of(stem)]
    assert not listing


def source_of(stem: str) -> str:
    return "\n".join(book.sources(book.read(chapter(stem))))


# ------------------------------------------------------------------------ readme, links
def test_readme_is_made_from_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "PICTURES", tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == book.readme(), "run `make readme`"
    for picture in tmp_path.iterdir():
        stored = ROOT / "nbs/pictures" / picture.name
        assert picture.read_bytes() == stored.read_bytes()


@pytest.fixture
def copied_chapter(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(book, "ROOT", tmp_path)
    path = tmp_path / "nbs/1_plane/07_comparing.ipynb"
    path.parent.mkdir(parents=True)
    shutil.copy(chapter("07_comparing"), path)
    return path


URL = "https://github.com/somebody/soflow"


def test_links_come_with_the_address_of_the_repository_and_go(copied_chapter):
    before = [cell.source for cell in book.read(copied_chapter).cells]
    for _ in range(2):
        book.set_links(copied_chapter, URL)
        now = [cell.source for cell in book.read(copied_chapter).cells]
        assert now[0] == before[0] and now[3:] == before[1:]
    colab = "github/somebody/soflow/blob/HEAD/nbs/1_plane/07_comparing.ipynb)"
    assert colab in now[1]
    assert "labpath=nbs%2F1_plane%2F07_comparing.ipynb)" in now[1]
    for url in ("", "https://example.org/soflow"):
        book.set_links(copied_chapter, url)
        assert [cell.source for cell in book.read(copied_chapter).cells] == before


def test_links_leave_a_notebook_valid_and_fresh(copied_chapter):
    import nbformat

    book.set_links(copied_chapter, URL)
    nbformat.validate(book.read(copied_chapter))
    assert not book.staleness(copied_chapter)


def test_the_cell_that_installs_does_so_only_where_the_package_is_missing(
    copied_chapter, monkeypatch
):
    book.set_links(copied_chapter, URL)
    install = book.read(copied_chapter).cells[2].source
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: calls.append(words))
    exec(install, {})
    assert not calls
    exec(install.replace("soflow_edu", "soflow_edu_2"), {})
    assert calls[0][-1].endswith(f"@ git+{URL}")


@every(CHAPTERS)
def test_chapters_have_the_links_of_this_repository(path):
    own = {"links", "install"}
    cells = [cell for cell in book.read(path).cells if own & set(book.tags(cell))]
    expected = [cell.source for cell in book.link_cells(path, book.git_url())]
    assert [cell.source for cell in cells] == expected, "run `python nbs/book.py links`"


# ------------------------------------------------------------------------ names
TEXTS = {".py", ".md", ".ini", ".toml", ".yaml", ".yml", ".txt"}


def test_no_file_carries_a_path_of_a_machine():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        if Path(name).suffix in TEXTS and Path(name).stem != "test_book":
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"/(?:home|root|work|Users)/[\w.]", text), name
