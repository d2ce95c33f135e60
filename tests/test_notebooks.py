"Every notebook runs, is committed as it ran, and can be read by everybody."
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "nbs"))
import book  # noqa: E402

NOTEBOOKS = book.notebooks()
NAMES = [str(path.relative_to(book.NOTEBOOKS)) for path in NOTEBOOKS]
SECONDS = 900   # for a machine that is busy and slow; a chapter takes less than two minutes on a quiet one


def outputs(path):
    return [output for cell in book.code_cells(book.read(path)) for output in cell.outputs]


def pictures(path):
    return [output for output in outputs(path) if "image/png" in output.get("data", {})]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 12


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs(path):
    done = warm.run("nbdev-test", "--do-print", path, cwd=ROOT, timeout=SECONDS, MPLBACKEND="agg")
    assert done.returncode == 0 and f"Completed {path}" in done.stdout + done.stderr, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_those_of_this_code(path):
    assert not (why := book.staleness(path)), f"{path.name} {why}: run `make notebooks NOTEBOOKS={path.stem}`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_form(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1.5e6
    assert not re.search(r"/(?:home|root|work|Users|tmp)/[\w.]", text), "names a path of a machine"
    assert "widget-state" not in text and "widget-view" not in text, "holds a widget, which is dead without its kernel"
    lines = [len([line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]) for cell in book.code_cells(book.read(path))]
    assert max(len(cell.source.splitlines()) for cell in book.code_cells(book.read(path))) <= 40 and statistics.median(lines) <= 6
    assert all(output.data.get("text/plain", "").endswith(".") for output in pictures(path)), "a figure has no sentence of alternative text"


ASSIGNMENTS = [path for path in NOTEBOOKS if path.parent.name == "assignments"]   # exercises of another form, which export nothing
CHAPTERS = [path for path in NOTEBOOKS if path.parent != book.NOTEBOOKS and path not in ASSIGNMENTS]


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_chapter_has_its_parts(path):
    notebook = book.read(path)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.startswith("# ") and "What this chapter promises" in prose and "un time:" in prose and "**Predict before you" in prose
    assert pictures(path), "no figure"
    if path.stem != "00_start":
        solutions = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
        assert len(solutions) == 3 and all(cell.metadata.jupyter.source_hidden for cell in solutions)
        assert all("assert" in cell.source or "raise AssertionError" in cell.source for cell in solutions), "a solution does not end in a check"


@pytest.mark.parametrize("path", ASSIGNMENTS, ids=[path.stem for path in ASSIGNMENTS])
def test_assignment_has_its_parts(path):
    "Goals, times, a check below each code question, hints folded, written questions, a figure of the student's own; the rest is checked where it is read."
    from soflow_edu.grading import read_assignment, role

    assignment, notebook = read_assignment(path), book.read(path)
    opening = notebook.cells[0].source
    assert opening.startswith("# ") and all(words in opening for words in ("**You need**", "**Time:**", "**What you will be able to do afterwards**", "**How it works.**"))
    assert sum(q.written for q in assignment.questions) >= 2 and pictures(path)
    assert [cell for cell in book.code_cells(notebook) if cell.source.startswith("@attempt")], "nothing is drawn from the student's answers"
    kinds = [role(cell) for cell in assignment.cells]
    for q in assignment.questions:
        first = next(k for k, cell in enumerate(notebook.cells) if cell.source.startswith(f"### Question {q.number}. "))
        start = next(k for k, cell in enumerate(assignment.cells) if cell is q.answer)
        task = "\n".join(cell.source for cell in notebook.cells[first:start] if cell.cell_type == "markdown")
        assert re.search(r"\(\d+ minutes\)", task), f"question {q.number} does not say how long it takes"
        if not q.written:
            assert "<details>" in task and "</details>" in task, f"question {q.number} has no folded hint"
            tests = next(k for k, cell in enumerate(assignment.cells) if cell is q.tests)
            assert any(re.search(rf'"Question {q.number}\b', cell["source"]) for cell in assignment.cells[start + 1:tests]) and kinds[start - 3:start] == ["wrong"] * 3
    assert "default_exp" not in path.read_text(encoding="utf-8")


def test_chapters_import_only_earlier_ones():
    seen = set()
    for path in CHAPTERS:
        code = "\n".join(cell.source for cell in book.code_cells(book.read(path)))
        exported = "\n".join(cell.source for cell in book.code_cells(book.read(path)) if cell.source.startswith("#| export"))
        module = re.search(r"#\| default_exp (\w+)", code)
        assert not (late := book.imported(exported) - seen), f"{path.name} exports code that imports {late}, which come later"
        if module:
            assert not (late := book.imported(code) - seen - {module[1]}), f"{path.name} imports {late}, which come later"
            seen.add(module[1])


def test_readme_is_made_from_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "PICTURES", tmp_path)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == book.readme(), "run `make readme`"
    for picture in tmp_path.iterdir():
        assert picture.read_bytes() == (ROOT / "nbs/pictures" / picture.name).read_bytes()


def test_digest_sees_a_change(tmp_path, monkeypatch):
    "In a cell, in a module that is imported, in a module that such a module imports, and in a configuration that is loaded by its name or listed."
    notebook = book.read(next(path for path in CHAPTERS if path.stem == "07_comparing"))
    before = book.digest(notebook)
    for name in ("solution", "config"):
        shutil.copytree(book.PACKAGE, tmp_path / name)
        with open(tmp_path / name / f"{name}.py", "a") as module:
            module.write("\nextra = 1\n")
        monkeypatch.setattr(book, "PACKAGE", tmp_path / name)
        assert book.digest(notebook) != before
    monkeypatch.undo()
    start, ladder = (book.read(next(path for path in CHAPTERS if path.stem == stem)) for stem in ("00_start", "05_ladder"))          # start reaches the objective by its name only
    before, of_ladder = book.digest(start), book.digest(ladder)
    shutil.copytree(book.PACKAGE, tmp_path / "objective")
    with open(tmp_path / "objective/consistency.py", "a") as module:
        module.write("\nextra = 1\n")
    monkeypatch.setattr(book, "PACKAGE", tmp_path / "objective")
    assert book.digest(start) != before
    for name, seen in (("plane", True), ("imagenet-laptop", False)):
        monkeypatch.undo()
        shutil.copytree(book.PACKAGE, tmp_path / name)
        with open(tmp_path / name / f"configs/{name}.yaml", "a") as file:
            file.write("# another remark\n")
        monkeypatch.setattr(book, "PACKAGE", tmp_path / name)
        assert (book.digest(start) != before) == seen
        assert book.digest(ladder) != of_ladder
    monkeypatch.undo()
    before = book.digest(notebook)
    book.code_cells(notebook)[-1].source += "\n1 + 1"
    assert book.digest(notebook) != before


def test_links_come_and_go_with_the_address_of_the_repository(tmp_path, monkeypatch):
    import nbformat

    monkeypatch.setattr(book, "ROOT", tmp_path)
    path = tmp_path / "nbs/1_plane/07_comparing.ipynb"
    path.parent.mkdir(parents=True)
    shutil.copy(next(path for path in CHAPTERS if path.stem == "07_comparing"), path)
    before, sources = book.read(path), lambda: [cell.source for cell in book.read(path).cells]
    for _ in range(2):
        book.set_links(path, "https://github.com/somebody/soflow")
        assert sources()[0] == before.cells[0].source and sources()[3:] == [cell.source for cell in before.cells[1:]]
    links, install = sources()[1:3]
    assert "(https://colab.research.google.com/github/somebody/soflow/blob/HEAD/nbs/1_plane/07_comparing.ipynb)" in links and "labpath=nbs%2F1_plane%2F07_comparing.ipynb)" in links
    assert not book.staleness(path)
    nbformat.validate(book.read(path))
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: calls.append(words))
    exec(install, {})
    assert not calls, "the package is here, so nothing is to be installed"
    exec(install.replace("soflow_edu", "soflow_edu_2"), {})
    assert calls[0][-1].endswith("@ git+https://github.com/somebody/soflow")
    for url in ("", "https://example.org/soflow"):
        book.set_links(path, url)
        assert sources() == [cell.source for cell in before.cells]


def test_chapters_have_the_links_of_this_repository():
    for path in CHAPTERS:
        found = [cell.source for cell in book.read(path).cells if {"links", "install"} & set(cell.metadata.get("tags", []))]
        assert found == [cell.source for cell in book.link_cells(path, book.git_url())], "run `python nbs/book.py links`"


def test_names_nothing_but_itself():
    "No file carries a path of a machine or an address of a registry, except the place where torch builds live."
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if Path(name).suffix in {".py", ".md", ".ini", ".toml", ".yaml", ".yml", ".txt"} and "test_notebooks" not in name:
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"/(?:home|root|work|Users)/[\w.]", text), name
    assert json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["nbformat"] == 4
