"Assignments: what students get, and what they get for what they hand in."

import csv
import json
import re
import subprocess
from functools import cache

import pytest
from filelock import FileLock  # comes with torch

import hostile
from helpers import ROOT, program
from soflow_edu import grading
from soflow_edu.cli import COMMANDS
from soflow_edu.grading import (
    GradingError,
    estimated_minutes,
    grade_course,
    instructor_cells,
    is_named,
    personal,
    personal_mixture,
    points_of_run,
    read_assignment,
    read_notebook,
    said_of,
    stated_minutes,
    student_cells,
    without,
    write_notebook,
    wrong_answers,
)

SOLVED = sorted((ROOT / "nbs/assignments").glob("*.ipynb"))
NAMES = [path.stem for path in SOLVED]
SECONDS = 8  # a cell of a student, on a busy machine; more where it trains
EACH_ASSIGNMENT = pytest.mark.parametrize("path", SOLVED, ids=NAMES)


def soflow(*words):
    # Its time is limited: a limit for students that does not fire would hang here.
    return program("soflow", *words, folder=ROOT, timeout=900)


# ------------------------------------------------------------- what is secret
def telling(source):
    "Lines that are telling: long enough not to stand in a notebook by chance."
    lines = [line.strip() for line in source.splitlines()]
    return {line for line in lines if len(line) > 18}


def region(source, mark):
    "What stands between two markers."
    inside = source.partition(f"BEGIN {mark}")[2].partition(f"END {mark}")[0]
    for sign in ("###", "-->", "<!--"):
        inside = inside.replace(sign, "")
    return inside


def outside_regions(source):
    before = source.partition("### BEGIN")[0]
    after = source.partition("### END")[2]
    return before + after


def solution(q):
    return telling(region(q.answer["source"], "SOLUTION"))


def hidden_tests(q):
    return set() if q.written else telling(region(q.tests["source"], "HIDDEN TESTS"))


def lines_of_wrong_answers(q):
    lines = set()
    for source in q.wrong.values():
        lines |= {line for line in telling(source) if not line.startswith("def ")}
    return lines


def open_to_all(assignment):
    "Lines that students may see, although they may be part of a solution as well."
    lines = set()
    for cell in assignment.cells:
        if "#| wrong" not in cell["source"]:
            lines |= telling(outside_regions(cell["source"]))
    return lines


# ---------------------------------------------------------------- submissions
def hand_in(folder, assignment, answers, cells=None):
    """Writes a submission: the student notebook with answers, question -> source.

    A written question without one stays empty."""
    made = [dict(cell) for cell in cells or student_cells(assignment)]
    for cell in made:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id", "")
        number = name.removeprefix("question-")
        if number.isdigit() and int(number) in answers:
            cell["source"] = answers[int(number)]
        if name == "identifier":
            own = f'identifier = "{folder.name}"'
            cell["source"] = answers.get("identifier", own)
    write_notebook(folder / f"{assignment.name}.ipynb", made, assignment.name)


def right_answers(assignment):
    answers = {}
    for q in assignment.questions:
        lines = q.answer["source"].splitlines()
        kept = [line for line in lines if not re.search(r"SOLUTION|#\|", line)]
        answers[q.number] = "\n".join(kept)
    return answers


def half_wrong(assignment):
    "A wrong answer to every second code question: question -> source."
    code = [q for q in assignment.questions if not q.written]
    return {q.number: next(iter(q.wrong.values())) for q in code[::2]}


def full_marks(assignment):
    "Marks before a person has read the written answers."
    return {q.number: None if q.written else q.points for q in assignment.questions}


def stubs_of(assignment):
    stubs = {}
    for q in assignment.questions:
        if not q.written:
            stubs[q.number] = without(q.answer["source"], "SOLUTION", grading.STUB)
    return stubs


@pytest.fixture(scope="session")
def course(tmp_path_factory, worker_id):
    """What `soflow course build` makes of all assignments.

    It is built once, by whichever of pytest's workers needs it first."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "course"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            built = soflow("course", "build", "--out", folder)
            assert built.status == 0, built.err
            print(built.out)
    return folder


# ---------------------------------------------------------------- what is built
def sources(path):
    return "\n".join(cell["source"] for cell in read_notebook(path)["cells"])


def lines_of(text):
    return {line.strip() for line in text.splitlines()}


@pytest.mark.slow
def test_the_course_has_its_parts(course):
    parts = {path.name for path in course.iterdir()}
    assert parts == {"student", "solution", "instructor", "contents.md"}


@pytest.mark.slow
@EACH_ASSIGNMENT
def test_student_notebook_holds_no_secret(path, course):
    assignment = read_assignment(path)
    student = course / f"student/{path.name}"
    seen = sources(student)
    for q in assignment.questions:
        secret = solution(q) | hidden_tests(q) | lines_of_wrong_answers(q)
        secret -= open_to_all(assignment)
        assert secret and not secret & lines_of(seen), f"question {q.number}"
    assert "BEGIN" not in seen and "#| wrong" not in seen
    assert "### Question 1. " in seen and "points)" in seen
    assert not [cell for cell in read_notebook(student)["cells"] if cell.get("outputs")]


@pytest.mark.slow
@EACH_ASSIGNMENT
def test_solution_and_rubric_hold_what_they_should(path, course):
    assignment = read_assignment(path)
    solved = sources(course / f"solution/{path.name}")
    assert "BEGIN" not in solved and "#|" not in solved
    table = (course / f"instructor/{path.stem}_rubric.md").read_text()
    for q in assignment.questions:
        assert solution(q) <= lines_of(solved)
        assert f"| {q.number}. {q.title} | {q.points:g} |" in table


@pytest.mark.slow
@EACH_ASSIGNMENT
def test_student_notebook_runs_without_answers(path, course):
    "Its checks say for each question that it is not done."
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(course / f"student/{path.name}", as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.execute(stderr=subprocess.DEVNULL)  # raises if a cell does
    outputs = []
    for cell in notebook.cells:
        outputs += cell.get("outputs", [])
    said = "".join(out.text for out in outputs if out.output_type == "stream")
    for q in read_assignment(path).questions:
        words = rf"^Question {q.number}\b.*not (done )?yet"
        assert q.written or re.search(words, said, flags=re.M), q.number


@EACH_ASSIGNMENT
def test_nbgrader_sees_what_students_get(path):
    """Metadata of the instructor's notebook.

    Names are unique, points are those of tests and written answers only, and all
    else is locked or a solution."""
    assignment = read_assignment(path)
    cells = instructor_cells(assignment)
    tags = [cell["metadata"].get("nbgrader") for cell in cells]
    tags = [tag for tag in tags if tag]
    assert len({tag["grade_id"] for tag in tags}) == len(tags)
    assert sum(tag.get("points", 0) for tag in tags) == assignment.points
    for tag in tags:
        assert ("points" in tag) == tag["grade"]
        assert tag["locked"] or tag["solution"] or tag["grade_id"] == "identifier"


def test_a_solution_is_cut_out():
    source = "a\n    ### BEGIN SOLUTION\n    b\n    ### END SOLUTION\nc"
    assert without(source, "SOLUTION", "stub") == "a\n    stub\nc"


@EACH_ASSIGNMENT
@pytest.mark.slow
def test_reference_is_right_for_every_student(path):
    assignment = read_assignment(path)
    for identifier in ("Zoë O'Neill", "12345"):
        assert points_of_run(assignment, identifier, {}) == assignment.code_points


# ------------------------------------------------------- what checks say in words
LONG = {  # questions whose checks train or search for each wrong answer
    "01_paths_and_solvers": (11,),
    "03_solution_consistency": (11,),
    "04_guidance": (7,),
}


def answers_of(assignment, long=False):
    "Wrong answers, question -> {name: source}, with long checks or with the others."
    some = LONG.get(assignment.name, ())
    every = wrong_answers(assignment)
    return {n: rows for n, rows in every.items() if (n in some) == long}


@cache
def said_to_wrong(path):
    "What checks say to wrong answers, but for those with long checks."
    assignment = read_assignment(path)
    return said_of(assignment, answers_of(assignment))


def table_of_words(said):
    "Lines of a table, with a star where no mistake is named."
    for number, words in said.items():
        for name, line in words.items():
            mark = " " if is_named(line) else "*"
            yield f"{mark} {number:2d} {name}: {' / '.join(line.splitlines())}"


@EACH_ASSIGNMENT
def test_mistakes_are_named(path):
    """At least sixteen of twenty wrong answers, and at most one is called right.

    `python -m pytest tests/test_course.py -k named -s` prints all of them."""
    said = said_to_wrong(path)
    print(f"\n{path.stem}", *table_of_words(said), sep="\n")
    words = []
    for row in said.values():
        words += row.values()
    assert len(words) >= 20
    assert sum(map(is_named, words)) >= 0.8 * len(words)
    called_right = [line for line in words if set(line.splitlines()) == {"right."}]
    assert len(called_right) <= 1, "a check that cannot tell wrong from right"


def named_sentences(line):
    "How many sentences of a check's words name a mistake."
    return sum(map(is_named, re.split(r"(?<=[.?]) ", line)))


@EACH_ASSIGNMENT
def test_two_mistakes_are_both_named(path):
    "Those wrong answers that have two, in one part or in two."
    words = []
    for row in said_to_wrong(path).values():
        words += [line for name, line in row.items() if "two mistakes" in name]
    both = re.compile(r"; and|two things at once|and its sign", flags=re.I)
    two = [line for line in words if both.search(line) or named_sentences(line) > 1]
    assert len(words) >= 5 and len(two) >= 0.8 * len(words), set(words) - set(two)


@pytest.mark.slow
def test_mistakes_with_long_checks_are_named():
    "What is wrong with a trained map, and what to change, among others."
    for path in SOLVED:
        assignment = read_assignment(path)
        answers = answers_of(assignment, long=True)
        said = said_of(assignment, answers) if answers else {}
        print("\n".join(table_of_words(said)))
        for words in said.values():
            assert all(map(is_named, words.values())), words


@EACH_ASSIGNMENT
def test_right_answers_are_called_right(path):
    "For another student too; and by the same words for each check."
    assignment = read_assignment(path)
    right = right_answers(assignment)
    answers = {n: {"right": right[n]} for n in answers_of(assignment)}
    for words in said_of(assignment, answers, "Zoë O'Neill").values():
        assert set(words["right"].splitlines()) == {"right."}, words


def test_an_exception_is_told_with_its_line():
    assignment = read_assignment(SOLVED[0])
    sources = {
        "no dimension": assignment.questions[1].wrong[
            "times without a dimension of their own"
        ],
        "no name": "def on_the_way(x0, x1, alpha, beta, a, b):\n    return gone",
        "None": "def on_the_way(x0, x1, alpha, beta, a, b):\n    return None + x0, x0",
    }
    said = said_of(assignment, {2: sources})[2]
    assert "`xt = alpha * x0 + beta * x1`" in said["no dimension"]
    assert "write alpha[:, None]" in said["no dimension"]
    assert "name 'gone' is not defined" in said["no name"]
    assert "`return gone`" in said["no name"] and "imported" in said["no name"]
    assert "does not return yet" in said["None"]


@EACH_ASSIGNMENT
def test_feedback_can_say_what_was_tested_and_why(path):
    for q in read_assignment(path).questions:
        if not q.written:
            found = grading.directives(q.tests["source"])
            assert found["tests"] and found["why"].endswith("."), q.number
            (line,) = grading.lesson(q, 0.0)
            assert found["why"] in line and "assert" not in line


LIBRARIES = ("math", "torch")


@EACH_ASSIGNMENT
def test_what_answers_need_is_imported(path):
    assignment = read_assignment(path)
    given = "\n".join(c["source"] for c in assignment.cells[:2])
    for name in LIBRARIES:
        assert re.search(rf"^import {name}$", given, flags=re.M), name


# ---------------------------------------------------------------------- how long
@EACH_ASSIGNMENT
def test_stated_minutes_are_those_of_words_and_lines(path):
    "Within a factor of two for a question, and of 1.3 for all of an assignment."
    assignment = read_assignment(path)
    estimated = estimated_minutes(assignment)
    stated = stated_minutes(assignment)
    assert set(stated) == {q.number for q in assignment.questions}
    for number, minutes in stated.items():
        assert 0.5 < estimated[number] / minutes < 2, number
    rest = estimated[0]
    whole = sum(estimated.values())
    assert 1 / 1.3 < whole / (sum(stated.values()) + rest) < 1.3
    opening = assignment.cells[0]["source"]
    low, high = re.search(r"\*\*Time:\*\* (\d+) to (\d+) minutes", opening).groups()
    assert int(low) <= 1.05 * whole and sum(stated.values()) <= int(high)
    print(f"{assignment.name}: {sum(stated.values()):g} stated, {whole:.0f} estimated")


# -------------------------------------------------------------- what is marked
def marked(home, out, name, seconds):
    """What `soflow course grade` prints and writes.

    Its output, the table of marks by student, and the points of each question."""
    done = soflow("course", "grade", home, "--out", out, "--seconds", seconds)
    print(done.out)
    assert done.status == 0, done.err
    rows = {row["student"]: row for row in table_of(out / name)}
    got = {student: points_of(row) for student, row in rows.items()}
    return done.out, rows, got


def table_of(folder):
    with open(folder / "marks.csv", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def points_of(row):
    points = {}
    for key, cell in row.items():
        if re.fullmatch(r"Q\d+", key):
            points[int(key[1:])] = None if cell == "-" else float(cell)
    return points


def reveals_nothing(assignment, folder, students):
    "No line of a solution or of a hidden test stands in the feedback."
    for student in students:
        text = (folder / f"feedback/{student}.md").read_text()
        text = re.sub(r"\x1b\[[\d;]*m", "", text)  # a traceback is coloured
        for q in assignment.questions:
            told = [line for line in solution(q) | hidden_tests(q) if line in text]
            assert not told, (student, q.number)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLVED[1:], ids=NAMES[1:])
def test_marks_of_each_assignment(path, tmp_path):
    """Every second question right, the others wrong.

    The rehearsal in `course` has tried each right and each wrong answer by itself,
    and none at all; empty submissions, copied and torn ones are tried below."""
    assignment = read_assignment(path)
    wrong = half_wrong(assignment)
    home = tmp_path / "submissions"
    out = tmp_path / "marks"
    hand_in(home / "ada", assignment, right_answers(assignment) | wrong)
    _, rows, got = marked(home, out, path.stem, 3 * SECONDS)
    assert got == {"ada": full_marks(assignment) | dict.fromkeys(wrong, 0.0)}
    assert not rows["ada"]["notes"]
    reveals_nothing(assignment, out / path.stem, got)


# What a forger writes into an answer: it replaces the helper of the tests in memory.
PATCH = """
import soflow_edu.grading
soflow_edu.grading.close = lambda *args: True"""


def forged(assignment):
    """The student notebook without answers, but with every forgery that we know.

    Tests and given cells are rewritten, one test is deleted, and all cells are tagged
    so that they are not run; the helper of the tests is replaced in memory."""
    cells = []
    for original in student_cells(assignment):
        cell = json.loads(json.dumps(original))
        tag = cell["metadata"].get("nbgrader", {})
        name = tag.get("grade_id")
        if name == "question-1-tests":
            continue
        if tag.get("grade") and cell["cell_type"] == "code":
            cell["source"] = "pass"
            tag.update(points=100, locked=False)
        elif tag.get("locked"):
            cell["source"] += "\nclose = lambda *args: True"
        elif name == "question-2":
            cell["source"] += f"{PATCH}\nintegrate = lambda *args, **options: True"
        cell["metadata"]["tags"] = ["skip-execution"]
        cells.append(cell)
    return cells


def test_a_replaced_helper_would_have_earned_points():
    "Otherwise the forger below would not show that tests get their imports anew."
    assignment = read_assignment(SOLVED[0])
    stubs = stubs_of(assignment)
    honest = points_of_run(assignment, "ada", stubs)
    real = grading.close
    try:
        cheated = points_of_run(assignment, "ada", stubs | {2: stubs[2] + PATCH})
    finally:
        grading.close = real
    assert not any(honest.values()) and sum(cheated.values()) > 10


def steps_of(name):
    "The number of question 11, by a loop of its own."
    import torch

    from soflow_edu.odes import ExactFlow, integrate
    from soflow_edu.paths import LinearPath

    flow = ExactFlow(personal_mixture(name), LinearPath())
    generator = personal(name, "noise")
    noise = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    ends = flow.solution(noise, 1.0, 0.0)
    for steps in range(1, 100):
        reached = integrate(flow, noise, 1.0, 0.0, method="euler", steps=steps).x
        if (reached - ends).norm(dim=1).median() < 0.1:
            return steps
    raise AssertionError("no number of steps is enough")


def answers_of_somebody():
    "Copied numbers, and the name of somebody for whom they are wrong."
    theirs = steps_of("somebody")
    law = personal_mixture("somebody")
    copied = {
        11: f"def steps_needed(): return {theirs}",
        12: f"def landing(): return torch.tensor({(law.weights @ law.means).tolist()})",
        "identifier": "identifier = 'somebody'",
    }
    names = ("copycat", "copycat2", "copycat3", "copycat4")
    return next(name for name in names if steps_of(name) != theirs), copied


def submit_all_kinds(home, assignment, copycat, copied):
    "The project's own set of submissions; returns the marks that are due."
    right = right_answers(assignment)
    wrong = half_wrong(assignment)
    full = full_marks(assignment)
    for name, answers in {
        "right": right,
        "half wrong": right | wrong,
        "empty": {},
        copycat: right | copied,
    }.items():
        hand_in(home / name, assignment, answers)
    hand_in(home / "forger", assignment, {}, forged(assignment))
    (home / "absent").mkdir()
    (home / "torn").mkdir()
    (home / "torn" / f"{assignment.name}.ipynb").write_text('{"cells": [')
    due = {
        "right": full,
        "half wrong": full | dict.fromkeys(wrong, 0.0),
        copycat: full | {11: 0.0, 12: 0.0},
    }
    nothing = dict.fromkeys(full, 0.0)
    return due | dict.fromkeys(("empty", "forger", "absent", "torn"), nothing)


def check_notes(rows, copycat):
    notes = {student: row["notes"] for student, row in rows.items()}
    assert "its identifier is 'somebody', but it was marked as" in notes[copycat]
    assert "nothing was handed in" in notes["absent"]
    assert "no notebook" in notes["torn"]
    assert not notes["right"] and not notes["half wrong"]
    for words in (
        "missing, and put back: tests of question 1",
        "changed, and restored: ",
        "tests of questions 2, 3, 4,",
        "look at: soflow_edu.grading.close =",
    ):
        assert words in notes["forger"]


@pytest.mark.slow
def test_marks_of_all_kinds_of_submissions(tmp_path):
    """Also forged, copied, torn and absent ones, and the whole table of marks.

    Endless loops and crashes are tried in chapter *grading*."""
    assignment = read_assignment(SOLVED[0])
    copycat, copied = answers_of_somebody()
    home = tmp_path / "submissions"
    due = submit_all_kinds(home, assignment, copycat, copied)
    said, rows, got = marked(home, tmp_path / "marks", assignment.name, SECONDS)
    assert got == due
    assert float(rows["right"]["total"]) == sum(assignment.code_points.values())
    assert all(student in said for student in rows)
    check_notes(rows, copycat)

    out = tmp_path / "marks" / assignment.name
    reveals_nothing(assignment, out, due)
    empty = (out / "feedback/empty.md").read_text()
    assert "was tested with: " in empty and "Why it matters: " in empty
    assert empty.count("| no answer |") == len(assignment.questions)
    words = "these are not the points of Heun's method"
    assert words in (out / "feedback/half wrong.md").read_text()


@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_tests_of_several_cells_are_one(path):
    "Of students' notebooks, and of marks."
    assignment = read_assignment(path)
    assert not any("#| continued" in cell["source"] for cell in assignment.cells)
    for q in assignment.questions:
        if not q.written:
            assert q.tests["source"].count("BEGIN HIDDEN TESTS") == 1
            assert q.tests["source"].endswith("### END HIDDEN TESTS")


# ----------------------------------------------------- a small assignment of our own
TITLE = "# Tiny"
IDENTIFIER = "#| identifier\nidentifier = 'your-name'"
ANSWER = """def twice(x):
    ### BEGIN SOLUTION
    return 2 * x   # the solution
    ### END SOLUTION"""
TESTS = """#| points: 1.5
#| tests: one number
### BEGIN HIDDEN TESTS
assert twice(3.5) == 7.0, 'that is not twice'
### END HIDDEN TESTS"""
MODEL_ANSWER = """<!-- #| points: 2 -->
<!-- ### BEGIN SOLUTION -->
A model answer.
<!-- ### END SOLUTION -->"""
TINY = {
    "title": TITLE,
    "identifier": IDENTIFIER,
    "heading-1": "### Question 1. Twice",
    "wrong-0": "#| wrong 0\ndef twice(x): return x + 0",
    "wrong-1": "#| wrong 1\ndef twice(x): return x + 1",
    "wrong-2": "#| wrong 2\ndef twice(x): return x + 2",
    "answer": ANSWER,
    "tests": TESTS,
    "heading-2": "### Question 2. Why",
    "written": MODEL_ANSWER,
}
IN_WORDS = ("title", "heading-1", "heading-2", "written")


def write_tiny(folder, texts):
    "An assignment of two questions that imports nothing; returns its path."
    cells = []
    for name, source in texts.items():
        kind = "markdown" if name in IN_WORDS else "code"
        cell = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
        cells.append(cell)
    write_notebook(folder / "tiny.ipynb", cells, "tiny")
    return folder / "tiny.ipynb"


SLIPS = [
    ("tests", "1.5", "two", "'two', which is no number"),
    ("wrong-1", "wrong 1", "wrong 0", "two wrong answers named '0'"),
    ("wrong-1", "#| wrong 1\n", "", "has 2 wrong answers"),
    ("answer", "### END SOLUTION", "", "do not match"),
    ("heading-2", "2.", "3.", "not numbered"),
    ("tests", "points: 1.5", "points: 0", "has no points"),
]


@pytest.mark.parametrize("name, old, new, words", SLIPS)
def test_slips_of_the_author_are_named(name, old, new, words, tmp_path):
    path = write_tiny(tmp_path, TINY | {name: TINY[name].replace(old, new)})
    with pytest.raises(grading.InputError, match=words):
        read_assignment(path)


@pytest.fixture
def tiny(tmp_path):
    return read_assignment(write_tiny(tmp_path, TINY))


def test_the_identifier_is_set_and_another_one_noted():
    cell = {"source": "identifier = 'ada'"}
    note = grading.set_identifier(cell, "eve")
    assert note == "its identifier is 'ada', but it was marked as 'eve'"
    assert cell == {"source": "identifier = 'eve'"}
    assert grading.set_identifier(cell, "Eve ") == "", "case and spaces do not matter"
    assert "is 'missing'" in grading.set_identifier({"source": "pass"}, "eve")


def test_only_locked_cells_count_as_changed(tiny):
    released = grading.named_cells(student_cells(tiny))
    for name, differs in (("question-1-tests", True), ("question-1", False)):
        assert grading.was_changed({"source": "pass"}, released[name]) == differs
        assert not grading.was_changed(released[name], released[name])


def test_missing_cells_go_back_to_their_places(tiny):
    released = grading.named_cells(student_cells(tiny))
    names: list[str | None] = ["question-1-tests"]
    cells = [{}]
    missing = grading.put_back(names, cells, released)
    assert names == ["identifier", "question-1", "question-1-tests", "question-2"]
    assert cells[2] == {} and cells[1]["source"] == released["question-1"]["source"]
    said = grading.in_words([*missing, "given-a", "given-b"])
    assert said == "identifier; answer of questions 1, 2; 2 given cells"


def test_the_reason_is_found_in_a_log():
    log = "Converting tiny\nRuntimeError: no kernel\nnbgrader.NbGraderException: failed"
    assert grading.last_line({"log": log}) == "RuntimeError: no kernel"
    assert grading.last_line({"error": "it stopped"}) == "it stopped"
    assert grading.last_line({}) == "it gave no reason"


def test_what_a_spreadsheet_changes_does_not_matter():
    assert grading.spaceless(f"x = 1  \n\n{grading.TESTS_STUB}") == "x = 1"
    for text in ("a", "=1+1", "-2", "+1", "@me"):
        guarded = grading.guarded(text)
        assert guarded[0] not in "=+-@" and grading.unguarded(guarded) == text


def test_a_mark_is_believed_only_if_its_tests_gave_it(tiny):
    twice = tiny.questions[0]
    ran = twice.tests | {"outputs": [], "execution_count": 3}
    grading.check_run(twice, ran, 1.5)
    for cell, points, words in (
        (twice.tests | grading.no_outputs(), 1.5, "never run"),
        (ran | {"source": "pass"}, 1.5, "altered"),
        (ran, 0.0, "not what its tests gave"),
    ):
        with pytest.raises(GradingError, match=words):
            grading.check_run(twice, cell, points)


def test_what_happened_is_told_in_words(tiny):
    twice = tiny.questions[0]
    solved = twice.answer | {"outputs": []}
    stub = {"source": stubs_of(tiny)[1], "outputs": []}
    error = {"output_type": "error", "ename": "ValueError"}
    passed = {"outputs": []}
    stopped = {"outputs": [error]}
    assert grading.what_happened(twice, solved, passed) == "all tests passed"
    assert grading.what_happened(twice, stub, stopped) == "no answer"
    own = grading.what_happened(twice, solved | stopped, stopped)
    assert own == "your answer stopped with ValueError"
    other = grading.what_happened(twice, solved, stopped)
    assert other == "a test stopped with ValueError"


class TwoStudents:
    "Two students of the small assignment, who are marked again and again."

    text = '=1+1; a "quoted" Zoë,\n\nand a second line'
    right = "def twice(x): return x + x"

    def __init__(self, folder):
        self.source = folder / "solved"
        self.home = folder / "submissions"
        self.out = folder / "marks"
        self.assignment = read_assignment(write_tiny(self.source, TINY))
        self.hand_in("ada", self.right, self.text)
        self.hand_in("bob", "def twice(x) return 2 * x", "Because.")

    def hand_in(self, student, code, words):
        hand_in(self.home / student, self.assignment, {1: code, 2: words})

    def grade(self):
        results = grade_course(self.home, self.out, str(self.source), 20)
        return {r.student: r for r in results["tiny"]}

    def feedback(self, student):
        return (self.out / f"tiny/feedback/{student}.md").read_text()

    def enter(self, delimiter, **marks):
        "Enters marks (student -> mark, comment) as a spreadsheet might save them."
        path = self.out / "tiny/written.csv"
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if row["student"] in marks:
                row["mark"], row["comment"] = marks[row["student"]]
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, grading.WRITTEN, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    def solutions_on_disk(self):
        "Notebooks in the folder of the marks that hold the solution."
        paths = self.out.rglob("*.ipynb")
        return [path for path in paths if "the solution" in path.read_text()]


@pytest.fixture
def two(tmp_path):
    return TwoStudents(tmp_path)


def interrupted(*args):
    raise KeyboardInterrupt


def failed(api, assignment, staged, student, name):
    return grading.Result(student, {1: None, 2: None}, failure="no kernel")


def check_first_marks(two, first):
    "What is written waits for a person, and a broken answer is called broken."
    assert first["ada"].marks == {1: 1.5, 2: None} and first["ada"].total == 1.5
    assert first["bob"].marks == {1: 0, 2: None}
    row = "| 1. Twice | 0 | 1.5 | your answer stopped with SyntaxError |"
    assert row in two.feedback("bob")
    assert "| **all** | **1.5** | **3.5** |" in two.feedback("ada")


@pytest.mark.slow
def test_marks_of_written_answers_last(two, monkeypatch):
    """Entered once, they survive marking again, an interruption and a failure.

    They do not survive a changed answer, which is noted."""
    check_first_marks(two, two.grade())
    two.enter(";", ada=("1,5", "good"), bob=("0", "why?"))
    for trouble, error in ((interrupted, KeyboardInterrupt), (failed, GradingError)):
        with monkeypatch.context() as patch:
            patch.setattr(grading, "mark", trouble)
            with pytest.raises(error):
                two.grade()
    two.hand_in("bob", two.right, "Another answer.")
    last = two.grade()
    ada = last["ada"]
    assert (ada.marks[2], ada.comments[2]) == (1.5, "good")
    assert ada.total == 3 and ada.answers[2] == two.text and not ada.notes
    assert "| 2. Why | 1.5 | 2 | good |" in two.feedback("ada")
    changed = "the answer to question 2 has changed since a person marked it"
    assert last["bob"].marks == {1: 1.5, 2: None} and last["bob"].notes == [changed]
    assert not two.solutions_on_disk(), "student code runs beside a solution"

    two.enter(",", ada=("7", ""))
    with pytest.raises(grading.InputError, match="from 0 to 2"):
        two.grade()


# -------------------------------------------------------------- what editors lose
LOST = ["nothing", "names", "names and metadata", "everything but the text"]


def answered(release, answers, lost):
    "The cells of the release with answers, after an editor has lost something."
    cells = json.loads(json.dumps(release))
    for k, cell in enumerate(cells):
        tag = cell["metadata"].get("nbgrader", {})
        number = tag.get("grade_id", "").removeprefix("question-")
        if number.isdigit() and cell["cell_type"] == "code":
            cell["source"] = answers[int(number)]
        if lost != "nothing" and tag:
            tag["grade_id"] = f"mine-{k}"
        if lost not in ("nothing", "names"):
            cell["metadata"] = None
        if lost == "everything but the text":
            cell["id"] = f"other-{k}"
    return cells


@pytest.mark.parametrize("lost", LOST)
def test_cells_are_known_again(lost):
    "Whatever an editor does, no answer is lost and no cell is doubled."
    assignment = read_assignment(SOLVED[0])
    release = student_cells(assignment)
    cells = answered(release, right_answers(assignment), lost)
    more = dict(cells[0], cell_type="code")  # which comes first, and is the student's
    staged, notes = grading.stage({"cells": [more, *cells]}, release, "your-name")
    metadata = [cell["metadata"] for cell in staged[1:]]
    assert not notes and metadata == [cell["metadata"] for cell in release]
    for cell, known in zip(cells, staged[1:], strict=True):
        due = cell["source"].replace("#| identifier\n", "")
        assert known["source"] == due.replace('"your-name"', "'your-name'")
    assert len({cell["id"] for cell in staged}) == len(staged)


# ------------------------------------------------------------ failures of nbgrader
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


def idle(self, *args, **options):
    "What nbgrader says when it has marked a notebook, without marking one."
    return {"success": True}


def run_nothing(patch):
    patch.setattr(grading, "patient", unmoved)


def start_no_kernel(patch):
    patch.setattr(grading, "patient", broken)


def do_nothing(patch):
    from nbgrader.apps import NbGraderAPI

    patch.setattr(NbGraderAPI, "autograde", idle)


FAULTS = [
    pytest.param(run_nothing, "never run", id="tests not run"),
    pytest.param(start_no_kernel, "no kernel today", id="no kernel"),
    pytest.param(do_nothing, "wrote no marked notebook", id="nothing done"),
]


@pytest.mark.parametrize("fault, words", FAULTS)
@pytest.mark.slow
def test_silent_failures_of_nbgrader_are_loud(fault, words, tmp_path, monkeypatch):
    assignment = read_assignment(SOLVED[0])
    home = tmp_path / "submissions"
    out = tmp_path / "marks"
    hand_in(home / "ada", assignment, {})
    fault(monkeypatch)
    with pytest.raises(GradingError, match=words):
        grade_course(home, out, str(SOLVED[0].parent))
    (row,) = table_of(out / assignment.name)
    assert row["Q1"] == row["total"] == "?"
    assert not list(out.glob("*/feedback/*"))


# ------------------------------------------------------ hostile and damaged submissions
FENCES = ("python", "bubblewrap")
NO_BUBBLEWRAP = "bubblewrap is not installed, or not allowed here"


def fence(kind, monkeypatch):
    "Chooses what keeps student code apart."
    if kind == "python":
        monkeypatch.setattr(grading, "can_wrap", bool)
    elif not grading.can_wrap():
        pytest.skip(NO_BUBBLEWRAP)


@pytest.fixture
def small(tmp_path):
    return hostile.SmallClass(tmp_path)


QUICK = ("an input transformer", "a helper replaced in memory", "a process that stays")
ATTACKS = {attack.name: attack for attack in hostile.ATTACKS}


@pytest.mark.parametrize("name", QUICK)
def test_some_attacks_fail(name, small):
    kind = "bubblewrap" if grading.can_wrap() else "python"
    assert small.stands(ATTACKS[name], kind) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", FENCES)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail(name, kind, small, monkeypatch):
    "Each loses its own question at most, reaches nothing, and leaves nothing."
    fence(kind, monkeypatch)
    assert small.stands(ATTACKS[name], kind) == []


TWELVE = (
    "right",
    "half an emoji in a comment",
    "the solution by the library",
    "an input transformer",
    "a tensor that is always right",
    "another student's file",
    "a process that stays",
    "a flood of words",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FENCES)
def test_a_class_of_twelve(kind, small, monkeypatch):
    "Hostile and damaged ones among them; each gets what is due, and nobody else's."
    fence(kind, monkeypatch)
    due = {"zoe": ["1", "1"]}
    for name in TWELVE:
        small.write(name, ATTACKS[name].answer)
        due[name] = [ATTACKS[name].due, ATTACKS[name].second]
    for name in ("torn", "numbers for text", "deep nesting"):
        path = small.write(name, hostile.RIGHT)
        path.write_bytes(hostile.damaged(small.assignment, name))
        due[name] = [hostile.TORN[name]] * 2
    with pytest.raises(GradingError, match="2 submissions have no marks"):
        grade_course(small.home, small.marks, str(small.solved), 6)
    rows = {row["student"]: row for row in table_of(small.marks / "small")}
    assert {name: [row["Q1"], row["Q2"]] for name, row in rows.items()} == due
    notes = {name: row["notes"] for name, row in rows.items()}
    assert "no notebook" in notes["torn"] and not notes["zoe"]
    assert "cannot be read" in notes["deep nesting"]
    assert "refused: " in notes["another student's file"]
    told = (small.marks / "small/feedback/a process that stays.md").read_text()
    assert "that is not the double" in told


@pytest.mark.parametrize("kind", hostile.TORN)
def test_a_damaged_notebook_is_one_students_affair(kind, small):
    path = small.write("eve", hostile.RIGHT)
    path.write_bytes(hostile.damaged(small.assignment, kind))
    staged = grading.staged_file(small.assignment, path, "eve")
    assert bool(staged.failure) == (hostile.TORN[kind] == "?")
    assert bool(staged.fault) == (hostile.TORN[kind] == "0")
    found = grading.submissions_of(small.home, [small.assignment])
    assert set(found) == {"eve", "zoe"}


# ----------------------------------------------------- faults that are not a student's
def test_a_process_that_does_not_begin_is_no_mark(small, monkeypatch):
    monkeypatch.setattr(grading, "BOOT", "raise SystemExit")
    with pytest.raises(GradingError, match="did not begin"):
        small.examine(hostile.RIGHT)


def test_a_process_without_assertions_is_no_mark(small, monkeypatch):
    "PYTHONOPTIMIZE would strip the tests."
    real = grading.clean_environment

    def optimised(own):
        return real(own) | {"PYTHONOPTIMIZE": "1"}

    monkeypatch.setattr(grading, "clean_environment", optimised)
    with pytest.raises(GradingError, match="assert False"):
        small.examine(hostile.RIGHT)


def test_a_given_cell_that_stops_is_no_mark(small, monkeypatch):
    monkeypatch.setattr(hostile, "NOTEBOOK", hostile.NOTEBOOK)
    text = hostile.NOTEBOOK.replace("import torch", "import torch\n1 / 0")
    monkeypatch.setattr(hostile, "NOTEBOOK", text)
    small.assignment = hostile.write_solved(small.solved)
    with pytest.raises(GradingError, match="a given cell stops with ZeroDivisionError"):
        small.examine(hostile.RIGHT)


@pytest.mark.slow
def test_marks_do_not_depend_on_the_environment(small, tmp_path):
    "Optimised, with a false kernel and without the environment's programs on PATH."
    small.write("idle", "def double(x): return None")
    kernel = tmp_path / "jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
    words = ("course", "grade", small.home, "--out", small.marks)
    done = program(
        "soflow",
        *(*words, "--source", small.solved),
        folder=tmp_path,
        PYTHONOPTIMIZE="2",
        JUPYTER_PATH=str(tmp_path / "jupyter"),
        PATH="/usr/bin:/bin",
    )
    assert done.status == 0, done.said
    rows = {row["student"]: row["Q1"] for row in table_of(small.marks / "small")}
    assert rows == {"idle": "0", "zoe": "1"}


# ------------------------------------------------- what answers do to their arguments
FUNCTIONS = """
import copy, torch

def fill(x, g):
    x.fill_(torch.rand((), generator=g).item())
    return x.shape

def often(action, n):
    return [action(k) for k in range(n)]

def learn(model, optimiser, x):
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    return model

def average(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    return other

def slopes(f, x):
    x = x.requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]
"""


@pytest.fixture(scope="module")
def box():
    grading.adopt()
    with grading.Calling([], grading.can_wrap()) as box:
        box.ask("run", 60, FUNCTIONS)
        yield box


def test_changed_arguments_come_back(box):
    import torch

    x = torch.zeros(2)
    g = torch.Generator().manual_seed(1)
    due = torch.rand((), generator=torch.Generator().manual_seed(1))
    shape = grading.Answer(box, "fill")(x, g)
    assert tuple(shape) == (2,) and x.tolist() == [due, due]
    after = torch.Generator().manual_seed(1)
    torch.rand((), generator=after)
    assert g.get_state().equal(after.get_state())


def test_functions_of_the_tests_can_be_called_there(box):
    seen = []

    def noted(k):
        seen.append(k)
        return 10 * k

    often = grading.Answer(box, "often")
    assert often(noted, 3) == [0, 10, 20] and seen == [0, 1, 2]
    assert often(abs, 2) == [0, 1]


def test_networks_are_trained_there(box):
    import torch

    models = [torch.nn.Linear(2, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    adams = [torch.optim.Adam(model.parameters()) for model in models]
    x = torch.randn(5, 2)
    learn = grading.Answer(box, "learn")
    for _ in range(2):  # the second time, Adam has moments
        assert learn(models[0], adams[0], x) is models[0]
        for _ in range(3):
            adams[1].zero_grad()
            models[1](x).square().mean().backward()
            adams[1].step()
    torch.testing.assert_close(models[0].weight, models[1].weight)
    twice = grading.Answer(box, "average")(models[0])
    torch.testing.assert_close(twice.weight, 2 * models[0].weight)
    assert twice is not models[0]


def test_functions_without_records_go_there(box):
    "A student may differentiate them."
    import torch

    space = {"__name__": "__main__", "torch": torch}
    exec("def wave(x): return torch.sin(3 * x)", space)
    x = torch.randn(4, dtype=torch.float64)
    given = grading.Answer(box, "slopes")(space["wave"], x)
    torch.testing.assert_close(given, 3 * torch.cos(3 * x))


# ----------------------------------------------------------- what spreadsheets save
def table_as(encoding, delimiter, answer):
    rows = [("student", "question", "points", "mark", "comment", "answer")]
    rows += [("", "", "", "", "", ""), ("Zoë", "2", "2", "1,5", "good – très", answer)]
    lines = ['"' + f'"{delimiter}"'.join(row) + '"' for row in rows]
    return "\r\n".join([*lines, "", ""]).encode(encoding)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_tables_of_spreadsheets_are_read(encoding, delimiter, tiny, tmp_path):
    path = tmp_path / "written.csv"
    path.write_bytes(table_as(encoding, delimiter, "a" * 140000))
    (entry,) = grading.read_written(path, tiny, ["Zoë"])
    assert (entry.student, entry.mark, entry.comment) == ("Zoë", 1.5, "good – très")
    assert entry.answer == "a" * 140000


def test_the_code_page_is_known_by_the_students(tiny, tmp_path):
    for page, name in (
        ("cp1250", "Łukasz Ťažký"),
        ("cp1251", "Женя"),
        ("cp1253", "Ζωή"),
    ):
        text = f"{name}: 1"
        assert grading.decoded(text.encode(page), [name]) == text


def test_an_answer_is_the_same_after_a_spreadsheet():
    answer = "Weil – σ groß ist.\n\n" + "word " * 8000
    for entered in (answer, answer.replace("–", "?").replace("σ", "?"), answer[:32767]):
        assert grading.same_answer(answer, grading.spaceless(entered))
    assert not grading.same_answer(answer, grading.spaceless(answer[:2000]))
    assert not grading.same_answer("yes", "no")


# ------------------------------------------------------------- guides and refusals
def guide(course, place):
    return (course / place / "guide.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["student", "instructor"])
def test_guides_speak_of_what_exists(course, place):
    "Each command and each assignment that a guide names is there."
    text = guide(course, place)
    for words in re.findall(r"^soflow (.+)$", text, flags=re.M):
        name, *more = words.split()
        assert name in COMMANDS, words
        group = COMMANDS[name]
        assert not isinstance(group, dict) or more[0] in group, words
    for name in re.findall(r"\b\d\d_\w+\.ipynb", text):
        assert (ROOT / "nbs/assignments" / name).exists()


@pytest.mark.slow
def test_plan_of_the_course_speaks_of_what_exists(course):
    "Four weeks, with chapters that there are, and each assignment once."
    text = guide(course, "instructor")
    rows = re.findall(r"^\| \d \|([^|]+)\|[^|]+\|([^|]+)\|$", text, flags=re.M)
    named = set()
    numbers = set()
    for chapters, assignments in rows:
        named |= {re.sub(r" \(.*", "", name).strip() for name in chapters.split(",")}
        numbers |= {int(n) for n in re.findall(r"(?:^|; )\s*(\d),", assignments)}
    known = {path.stem[3:] for path in ROOT.glob("nbs/[0-9]_*/*.ipynb")}
    assert len(rows) == 4 and named <= known, named - known
    assert numbers == {int(name[:2]) for name in NAMES}


@pytest.mark.parametrize(
    "words, hint",
    [
        (("grade", "none"), "No submission"),
        (("grade", "nowhere"), "is no folder"),
        (("build", "--source", "none"), "No solved notebooks"),
        (("grade", "none", "--seconds", 0), "--seconds"),
    ],
)
def test_refusals(words, hint, tmp_path):
    "Bad input ends in words."
    (tmp_path / "none").mkdir()
    places = {name: tmp_path / name for name in ("none", "nowhere")}
    done = soflow("course", *(places.get(word, word) for word in words))
    assert done.status == 2 and "Traceback" not in done.err
    assert hint in " ".join(done.err.split()), done.err
