"Assignments: what students get, and what they get for what they hand in."
import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
import warm
from filelock import FileLock     # comes with torch

from soflow_edu import grading
from soflow_edu.cli import COMMANDS
from soflow_edu.grading import GradingError, grade_course, instructor_cells, personal_mixture, played, read_assignment, read_notebook, student_cells, without, write_notebook

ROOT = Path(__file__).parent.parent
SOLVED = sorted((ROOT / "nbs/assignments").glob("*.ipynb"))
NAMES = [path.stem for path in SOLVED]
SECONDS = 8     # a cell of a student, on a busy machine; more where it trains


def soflow(*words):
    return warm.run("soflow", *words, cwd=ROOT)      # its time is limited: a limit for students that does not fire would hang here


def lines(source):
    "Lines that are telling: long enough not to stand in a notebook by chance."
    return {line.strip() for line in source.splitlines() if len(line.strip()) > 18}


def region(source, mark):
    return source.partition(f"BEGIN {mark}")[2].partition(f"END {mark}")[0].replace("###", "").replace("-->", "").replace("<!--", "")


def hand_in(folder, assignment, answers, cells=None):
    "Writes a submission: the student notebook with answers, question -> source; a written question without one stays empty."
    made = [dict(cell) for cell in cells or student_cells(assignment)]
    for cell in made:
        tag = cell["metadata"].get("nbgrader", {}).get("grade_id", "")
        if tag.removeprefix("question-").isdigit() and int(tag.removeprefix("question-")) in answers:
            cell["source"] = answers[int(tag.removeprefix("question-"))]
        if tag == "identifier":
            cell["source"] = answers.get("identifier", f'identifier = "{folder.name}"')
    write_notebook(folder / f"{assignment.name}.ipynb", made, assignment.name)


def right_answers(assignment):
    return {q.number: "\n".join(line for line in q.answer["source"].splitlines() if "SOLUTION" not in line and "#|" not in line) for q in assignment.questions}


def half_wrong(assignment):
    "A wrong answer to every second code question: question -> source."
    return {q.number: next(iter(q.wrong.values())) for q in [q for q in assignment.questions if not q.written][::2]}


@pytest.fixture(scope="session")
def course(tmp_path_factory, worker_id):
    "What `soflow course build` makes of all assignments. It is built once, by whichever of pytest's workers needs it first."
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "course"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            built = soflow("course", "build", "--out", folder)
            assert built.returncode == 0, built.stderr
            print(built.stdout)
    return folder


@pytest.mark.parametrize("path", SOLVED, ids=NAMES)
def test_student_notebook_holds_no_secret_and_runs_without_answers(path, course, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    assignment, student = read_assignment(path), course / f"student/{path.name}"
    seen = "\n".join(cell["source"] for cell in read_notebook(student)["cells"])
    outside = lambda source: source.partition("### BEGIN")[0] + source.partition("### END")[2]
    open_to_all = {line for cell in assignment.cells if "#| wrong" not in cell["source"] for line in lines(outside(cell["source"]))}
    for q in assignment.questions:
        secret = lines(region(q.answer["source"], "SOLUTION")) | (set() if q.written else lines(region(q.tests["source"], "HIDDEN TESTS")))
        secret |= {line for source in q.wrong.values() for line in lines(source) if not line.startswith("def ")}
        assert secret - open_to_all and not (secret - open_to_all) & {line.strip() for line in seen.splitlines()}, f"question {q.number}"
    assert "BEGIN" not in seen and "#| wrong" not in seen and "### Question 1. " in seen and "points)" in seen
    assert not [cell for cell in read_notebook(student)["cells"] if cell.get("outputs")]
    assert {p.name for p in course.iterdir()} == {"student", "solution", "instructor", "contents.md"}
    solution = "\n".join(cell["source"] for cell in read_notebook(course / f"solution/{path.name}")["cells"])
    assert "BEGIN" not in solution and "#|" not in solution and all(lines(region(q.answer["source"], "SOLUTION")) <= {line.strip() for line in solution.splitlines()} for q in assignment.questions)
    table = (course / f"instructor/{path.stem}_rubric.md").read_text()
    assert all(f"| {q.number}. {q.title} | {q.points:g} |" in table for q in assignment.questions)

    notebook = nbformat.read(student, as_version=4)
    nbformat.validate(notebook)
    monkeypatch.setenv("JUPYTER_PATH", warm.kernels())
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(stderr=subprocess.DEVNULL)      # raises if a cell does
    said = "".join(output.text for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if output.output_type == "stream")
    assert all(re.search(rf"^Question {q.number}\b.*not (done )?yet", said, flags=re.M) for q in assignment.questions if not q.written)


@pytest.mark.parametrize("path", SOLVED, ids=NAMES)
def test_reference_is_right_for_every_student(path):
    assignment = read_assignment(path)
    for identifier in ("Zoë O'Neill", "12345"):
        assert played(assignment, identifier, {}) == {q.number: q.points for q in assignment.questions if not q.written}


def forged(assignment):
    "The student notebook without answers, with tests and given cells rewritten, one test deleted, and all cells tagged so that they are not run; the helper of the tests is replaced in memory."
    cells = []
    for cell in student_cells(assignment):
        cell = dict(cell, metadata=json.loads(json.dumps(cell["metadata"])))
        tag = cell["metadata"].get("nbgrader", {})
        if tag.get("grade") and cell["cell_type"] == "code":
            if tag["grade_id"] == "question-1-tests":
                continue
            cell["source"], tag["points"], tag["locked"] = "pass", 100, False
        elif tag.get("locked"):
            cell["source"] += "\nclose = lambda *args: True"
        elif tag.get("grade_id") == "question-2":
            cell["source"] += "\nimport soflow_edu.grading\nsoflow_edu.grading.close = integrate = lambda *args, **options: True"
        cell["metadata"]["tags"] = ["skip-execution"]
        cells.append(cell)
    return cells


def test_a_replaced_helper_would_have_earned_points():
    "Otherwise the forger below would not show that tests get their imports anew."
    assignment = read_assignment(SOLVED[0])
    stubs = {q.number: without(q.answer["source"], "SOLUTION", grading.STUB) for q in assignment.questions if not q.written}
    honest, real = played(assignment, "ada", stubs), grading.close
    try:
        cheated = played(assignment, "ada", stubs | {2: stubs[2] + "\nimport soflow_edu.grading\nsoflow_edu.grading.close = lambda *args: True"})
    finally:
        grading.close = real
    assert not any(honest.values()) and sum(cheated.values()) > 10


def marked(home, out, name, seconds):
    "What `soflow course grade` prints and writes: its output, the table of marks by student, and the points of each question."
    done = soflow("course", "grade", home, "--out", out, "--seconds", seconds)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = {row["student"]: row for row in csv.DictReader(open(out / name / "marks.csv", encoding="utf-8-sig"))}
    points = lambda row: {int(key[1:]): None if cell == "-" else float(cell) for key, cell in row.items() if re.fullmatch(r"Q\d+", key)}
    return done.stdout, rows, {student: points(row) for student, row in rows.items()}


def reveals_nothing(assignment, folder, students):
    for student in students:
        text = re.sub(r"\x1b\[[\d;]*m", "", (folder / f"feedback/{student}.md").read_text())      # a traceback is coloured
        for q in assignment.questions:
            secret = lines(region(q.answer["source"], "SOLUTION")) | (set() if q.written else lines(region(q.tests["source"], "HIDDEN TESTS")))
            assert not [line for line in secret if line in text], (student, q.number)


@pytest.mark.parametrize("path", SOLVED[1:], ids=NAMES[1:])
def test_marks_of_each_assignment(path, tmp_path):
    "Every second question right, the others wrong. The rehearsal in `course` has tried each right and each wrong answer by itself, and none at all; empty submissions, copied and torn ones are tried below."
    assignment, wrong = read_assignment(path), half_wrong(read_assignment(path))
    hand_in(tmp_path / "submissions/ada", assignment, right_answers(assignment) | wrong)
    _, rows, got = marked(tmp_path / "submissions", tmp_path / "marks", path.stem, 3 * SECONDS)
    assert got == {"ada": {q.number: None if q.written else 0.0 if q.number in wrong else q.points for q in assignment.questions}}
    assert not rows["ada"]["notes"]
    reveals_nothing(assignment, tmp_path / "marks" / path.stem, got)


def test_marks_of_all_kinds_of_submissions(tmp_path):
    "The project's own set: also forged, copied, torn and absent ones, and the whole table of marks. Endless loops and crashes are tried in chapter *grading*."
    path = SOLVED[0]
    assignment = read_assignment(path)
    right, full = right_answers(assignment), {q.number: None if q.written else q.points for q in assignment.questions}
    code = [q.number for q in assignment.questions if not q.written]
    home, due = tmp_path / "submissions", {}

    def submit(name, answers, marks, cells=None):
        hand_in(home / name, assignment, answers, cells)
        due[name] = marks

    submit("right", right, full)
    submit("half wrong", right | half_wrong(assignment), full | dict.fromkeys(half_wrong(assignment), 0.0))
    submit("empty", {}, dict.fromkeys(full, 0.0))
    submit("forger", {}, dict.fromkeys(full, 0.0), forged(assignment))
    theirs = steps_of("somebody")
    mine = next(name for name in ("copycat", "copycat2", "copycat3", "copycat4") if steps_of(name) != theirs)
    place = (personal_mixture("somebody").weights @ personal_mixture("somebody").means).tolist()
    copied = {11: f"def steps_needed(): return {theirs}", 12: f"def landing(): return torch.tensor({place})", "identifier": "identifier = 'somebody'"}
    submit(mine, right | copied, full | {11: 0.0, 12: 0.0})
    (home / "torn").mkdir(), (home / "torn" / f"{path.stem}.ipynb").write_text('{"cells": [')
    (home / "absent").mkdir()
    due |= {"torn": dict.fromkeys(full, 0.0), "absent": dict.fromkeys(full, 0.0)}

    out = tmp_path / "marks" / path.stem
    said, rows, got = marked(home, tmp_path / "marks", path.stem, SECONDS)
    assert got == due
    assert float(rows["right"]["total"]) == sum(full[n] for n in code) and all(row["student"] in said for row in rows.values())
    assert "its identifier is 'somebody', but it was marked as" in rows[mine]["notes"] and "nothing was handed in" in rows["absent"]["notes"] and "no notebook" in rows["torn"]["notes"]
    assert "missing, and put back: tests of question 1" in rows["forger"]["notes"] and "changed, and restored: " in rows["forger"]["notes"] and "tests of questions 2, 3, 4," in rows["forger"]["notes"] and "look at: soflow_edu.grading.close =" in rows["forger"]["notes"]
    assert not rows["right"]["notes"] and not rows["half wrong"]["notes"]

    reveals_nothing(assignment, out, due)
    assert (out / "feedback/empty.md").read_text().count("| no answer |") == len(full)
    assert "these are not the points of Heun's method" in (out / "feedback/half wrong.md").read_text()


def steps_of(name):
    "The number of question 11, by a loop of its own."
    import torch

    from soflow_edu.grading import personal
    from soflow_edu.odes import ExactFlow, integrate
    from soflow_edu.paths import LinearPath

    flow, noise = ExactFlow(personal_mixture(name), LinearPath()), torch.randn(500, 2, generator=personal(name, "noise"), dtype=torch.float64)
    ends = flow.solution(noise, 1.0, 0.0)
    return next(n for n in range(1, 100) if (integrate(flow, noise, 1.0, 0.0, method="euler", steps=n).x - ends).norm(dim=1).median() < 0.1)


TINY = {
    "title": "# Tiny", "identifier": "#| identifier\nidentifier = 'your-name'", "heading-1": "### Question 1. Twice",
    **{f"wrong-{k}": f"#| wrong {k}\ndef twice(x): return x + {k}" for k in range(3)},
    "answer": "def twice(x):\n    ### BEGIN SOLUTION\n    return 2 * x   # the solution\n    ### END SOLUTION",
    "tests": "#| points: 1.5\n#| tests: one number\n### BEGIN HIDDEN TESTS\nassert twice(3.5) == 7.0, 'that is not twice'\n### END HIDDEN TESTS",
    "heading-2": "### Question 2. Why", "written": "<!-- #| points: 2 -->\n<!-- ### BEGIN SOLUTION -->\nA model answer.\n<!-- ### END SOLUTION -->"}


@pytest.fixture
def tiny(tmp_path):
    "An assignment of two questions that imports nothing: its folder, and itself."
    markdown = ("title", "heading-1", "heading-2", "written")
    cells = [{"cell_type": "markdown" if name in markdown else "code", "id": name, "metadata": {}, "source": source} for name, source in TINY.items()]
    write_notebook(tmp_path / "solved/tiny.ipynb", cells, "tiny")
    return tmp_path / "solved", read_assignment(tmp_path / "solved/tiny.ipynb")


def enter(path, delimiter, **marks):
    "Enters marks (student -> mark, comment) as a spreadsheet might save them."
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["mark"], row["comment"] = marks.get(row["student"], (row["mark"], row["comment"]))
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, grading.WRITTEN, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def test_marks_of_written_answers_last(tiny, tmp_path, monkeypatch):
    "Entered once, they survive marking again, an interruption and a failure; not a changed answer, which is noted. A broken answer is called broken."
    (source, assignment), home, out = tiny, tmp_path / "submissions", tmp_path / "marks"
    text = "=1+1; a \"quoted\" Zoë,\n\nand a second line"
    hand_in(home / "ada", assignment, {1: "def twice(x): return x + x", 2: text})
    hand_in(home / "bob", assignment, {1: "def twice(x) return 2 * x", 2: "Because."})
    again = lambda: {r.student: r for r in grade_course(home, out, str(source), 20)["tiny"]}
    first = again()
    assert first["ada"].marks == {1: 1.5, 2: None} and first["ada"].total == 1.5 and first["bob"].marks == {1: 0, 2: None}
    assert "| 1. Twice | 0 | 1.5 | your answer stopped with SyntaxError |" in (out / "tiny/feedback/bob.md").read_text() and "| **all** | **1.5** | **3.5** |" in (out / "tiny/feedback/ada.md").read_text()

    enter(out / "tiny/written.csv", ";", ada=("1,5", "good"), bob=("0", "why?"))
    real, due = grading.mark, (1.5, "good")
    for trouble in (KeyboardInterrupt, GradingError, None):
        def mark(api, a, path, student, name):
            if trouble is KeyboardInterrupt:
                raise trouble
            return grading.Result(student, {1: None, 2: None}, failure="no kernel") if trouble else real(api, a, path, student, name)

        monkeypatch.setattr(grading, "mark", mark)
        if trouble:
            with pytest.raises(trouble):
                again()
    hand_in(home / "bob", assignment, {1: "def twice(x): return 2 * x", 2: "Another answer."})
    last = again()
    assert not [path for path in out.rglob("*.ipynb") if "the solution" in path.read_text()], "student code runs beside a solution"
    assert (last["ada"].marks[2], last["ada"].comments[2]) == due and last["ada"].total == 3 and last["ada"].answers[2] == text
    assert last["bob"].marks == {1: 1.5, 2: None} and last["bob"].notes == ["the answer to question 2 has changed since a person marked it"] and not last["ada"].notes
    assert "| 2. Why | 1.5 | 2 | good |" in (out / "tiny/feedback/ada.md").read_text()
    enter(out / "tiny/written.csv", ",", ada=("7", ""))
    with pytest.raises(grading.InputError, match="from 0 to 2"):
        again()


@pytest.mark.parametrize("lost", ["nothing", "names", "names and metadata", "everything but the text"])
def test_cells_are_known_again(lost):
    "Whatever an editor does to names, ids and metadata, no answer is lost and no cell is doubled."
    assignment = read_assignment(SOLVED[0])
    release, right = student_cells(assignment), right_answers(assignment)
    cells = json.loads(json.dumps(release))
    for k, cell in enumerate(cells):
        tag = cell["metadata"].get("nbgrader", {})
        number = tag.get("grade_id", "").removeprefix("question-")
        cell["source"] = right[int(number)] if number.isdigit() and cell["cell_type"] == "code" else cell["source"]
        if lost != "nothing" and tag:
            tag["grade_id"] = f"mine-{k}"
        cell["metadata"] = cell["metadata"] if lost in ("nothing", "names") else None
        cell["id"] = f"other-{k}" if lost == "everything but the text" else cell["id"]
    staged, notes = grading.stage({"cells": [dict(cells[0], cell_type="code"), *cells]}, release, "your-name")
    assert not notes and [cell["metadata"] for cell in staged[1:]] == [cell["metadata"] for cell in release]
    assert [cell["source"] for cell in staged[1:]] == [cell["source"].replace('"your-name"', "'your-name'").replace("#| identifier\n", "") for cell in cells]
    assert len({cell["id"] for cell in staged}) == len(staged)


def unmoved(seconds, names):
    "A preprocessor that runs nothing: to nbgrader, all tests then look passed."
    from nbgrader.preprocessors import Execute

    class Unmoved(Execute):
        def preprocess(self, nb, resources, km=None):
            return nb, resources

    return Unmoved


def broken(seconds, names):
    "A preprocessor that fails, which nbgrader hides behind the exit status 0."
    from nbgrader.preprocessors import Execute

    class Broken(Execute):
        def preprocess(self, nb, resources, km=None):
            raise RuntimeError("no kernel today")

    return Broken


@pytest.mark.parametrize("fault, words", [(unmoved, "never run"), (broken, "no kernel today"), (None, "wrote no marked notebook")], ids=["tests not run", "no kernel", "nothing done"])
def test_silent_failures_of_nbgrader_are_loud(fault, words, tmp_path, monkeypatch):
    from nbgrader.apps import NbGraderAPI

    assignment = read_assignment(SOLVED[0])
    hand_in(tmp_path / "submissions/ada", assignment, {})
    if fault:
        monkeypatch.setattr(grading, "patient", fault)
    else:
        monkeypatch.setattr(NbGraderAPI, "autograde", lambda self, *args, **options: {"success": True})
    with pytest.raises(GradingError, match=words):
        grade_course(tmp_path / "submissions", tmp_path / "marks", str(SOLVED[0].parent))
    row, = csv.DictReader(open(tmp_path / f"marks/{assignment.name}/marks.csv", encoding="utf-8-sig"))
    assert row["Q1"] == row["total"] == "?" and not list(tmp_path.glob("marks/*/feedback/*"))


@pytest.mark.parametrize("name, old, new, words", [("tests", "1.5", "two", "'two', which is no number"), ("wrong-1", "wrong 1", "wrong 0", "two wrong answers named '0'"), ("wrong-1", "#| wrong 1\n", "", "has 2 wrong answers"),
                                                   ("answer", "### END SOLUTION", "", "do not match"), ("heading-2", "2.", "3.", "not numbered"), ("tests", "points: 1.5", "points: 0", "has no points")])
def test_slips_of_the_author_are_named(name, old, new, words, tiny):
    folder, _ = tiny
    (folder / "tiny.ipynb").write_text((folder / "tiny.ipynb").read_text().replace(*(json.dumps(text)[1:-1] for text in (TINY[name], TINY[name].replace(old, new)))))
    with pytest.raises(grading.InputError, match=words):
        read_assignment(folder / "tiny.ipynb")


def test_guides_speak_of_what_exists(course):
    "Each command, chapter and assignment that a guide names is there."
    chapters = {path.stem[3:] for path in ROOT.glob("nbs/[0-9]_*/*.ipynb")}
    for place in ("student", "instructor"):
        text = (course / place / "guide.md").read_text(encoding="utf-8")
        for words in re.findall(r"^soflow (.+)$", text, flags=re.M):
            name, *more = words.split()
            assert name in COMMANDS and (not isinstance(COMMANDS[name], dict) or more[0] in COMMANDS[name]), words
        assert all((ROOT / "nbs/assignments" / name).exists() for name in re.findall(r"\b\d\d_\w+\.ipynb", text))
    rows = re.findall(r"^\| \d \|([^|]+)\|[^|]+\|([^|]+)\|$", text, flags=re.M)
    named = {re.sub(r" \(.*", "", name).strip() for row in rows for name in row[0].split(",")}
    assert len(rows) == 4 and named <= chapters, named - chapters
    assert {int(n) for row in rows for n in re.findall(r"(?:^|; )\s*(\d),", row[1])} == {int(name[:2]) for name in NAMES}


def test_refusals(tmp_path):
    "Bad input ends in words."
    (tmp_path / "none").mkdir()
    for words, hint in ((("grade", tmp_path / "none"), "No submission"), (("grade", tmp_path / "nowhere"), "is no folder"), (("build", "--source", tmp_path / "none"), "No solved notebooks"),
                        (("grade", tmp_path / "none", "--seconds", 0), "--seconds")):
        done = soflow("course", *words)
        assert done.returncode == 2 and hint in " ".join(done.stderr.split()) and "Traceback" not in done.stderr, done.stderr


def test_nbgrader_sees_what_students_get():
    "Metadata of the instructor's notebook: unique names, points of tests and written answers only, all else locked or a solution."
    for path in SOLVED:
        assignment = read_assignment(path)
        tags = [cell["metadata"]["nbgrader"] for cell in instructor_cells(assignment) if "nbgrader" in cell["metadata"]]
        assert len({tag["grade_id"] for tag in tags}) == len(tags) and sum(tag.get("points", 0) for tag in tags) == sum(q.points for q in assignment.questions)
        assert all(("points" in tag) == tag["grade"] and (tag["locked"] or tag["solution"] or tag["grade_id"] == "identifier") for tag in tags)
        assert without("a\n    ### BEGIN SOLUTION\n    b\n    ### END SOLUTION\nc", "SOLUTION", "stub") == "a\n    stub\nc"
