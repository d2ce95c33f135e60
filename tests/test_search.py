"A search: equal draws, rows kept when it is resumed, failures, own methods."

import json
from dataclasses import replace

import pytest

from helpers import complaint, soflow
from soflow_edu import search
from soflow_edu.core import InputError, names
from soflow_edu.objectives import bench, read_rows
from soflow_edu.search import (
    METHODS,
    Budget,
    Choice,
    Knob,
    Method,
    Search,
    search_table,
)

TINY = Budget(draws=2, seconds=1.0, longer=1.0, steps=20, best=1, seeds=1)
STAGES = ["draw", "draw", "best", "fresh", "steps"]


@pytest.fixture
def made_up(monkeypatch):
    "Trials that are not trained: the error of draw 1 is the smaller one."
    ran = []

    def run(trial):
        ran.append(trial)
        errors = [0.5 - 0.1 * trial.draw, 0.2, None, None]
        took = {"steps_done": 10, "step_ms": 2.0, "train_seconds": 1.0}
        return trial.key | took | {"relative_rmse": errors}

    monkeypatch.setattr(search.Trial, "run", run)
    return ran


def known_methods() -> list[str]:
    "Methods whose objective is registered."
    known = names("objective")
    return [name for name in METHODS if METHODS[name].objective["name"] in known]


# ------------------------------------------------------------------------ the space
@pytest.mark.parametrize("name", known_methods())
def test_every_draw_of_a_method_can_be_built(name):
    Search(name).check()


def test_methods_with_the_same_knobs_see_the_same_draws():
    draws = [METHODS[name].draw(3) for name in ("soflow", "meanflow", "progressive")]
    for knob in search.SHARED:
        assert len({json.dumps(draw[knob.name]) for draw in draws}) == 1
    assert METHODS["soflow"].draw(3) != METHODS["soflow"].draw(4)


def test_a_knob_that_is_not_there_is_refused_before_anything_is_trained(monkeypatch):
    knobs = (Knob("objective.finest", Choice((16,))),)
    lost = Method("lost", {"name": "soflow"}, knobs)
    monkeypatch.setitem(METHODS, "lost", lost)
    assert "'finest'" in complaint(next, Search("lost").run())
    knobs = (Knob("objective.lam", Choice((7.0,))),)
    monkeypatch.setitem(METHODS, "lost", replace(lost, knobs=knobs))
    assert "a share lies in [0, 1]" in complaint(next, Search("lost").run())


# ------------------------------------------------------------------------ rows
def test_a_search_is_gone_on_with_where_it_was(tmp_path, made_up):
    own = Search("soflow", folder=str(tmp_path), budget=TINY)
    running = own.run()
    first = [next(running), next(running)]
    running.close()
    assert own.stored() == json.loads(json.dumps(first))
    assert not own.is_complete(own.stored())
    rows = list(own.run())
    assert [row["stage"] for row in rows] == STAGES
    assert len(made_up) == 5
    assert [trial.draw for trial in made_up] == [0, 1, 1, 1, 1]
    assert [trial.seed for trial in made_up] == [0, 0, 0, 1, 1]
    assert own.is_complete(own.stored())
    list(own.run())
    assert len(made_up) == 5


def test_a_row_of_other_settings_is_not_used(tmp_path, made_up, monkeypatch):
    own = Search("soflow", folder=str(tmp_path), budget=TINY)
    list(own.run())
    narrow = tuple(knob for knob in METHODS["soflow"].knobs if knob.name != "clip")
    changed = replace(METHODS["soflow"], knobs=narrow + (Knob("clip", Choice((2.0,))),))
    monkeypatch.setitem(METHODS, "soflow", changed)
    assert own.stored() == []
    rows = list(own.run())
    assert len(made_up) == 10
    assert {row["knobs"]["clip"] for row in rows} == {2.0}
    assert len(read_rows(own.path)) == 10  # the others stay in the file


def test_two_searches_at_one_file_do_not_lose_rows(tmp_path, made_up):
    own = Search("soflow", folder=str(tmp_path), budget=TINY)
    running = own.run()
    next(running)
    again = Search("soflow", folder=str(tmp_path), budget=TINY).run()
    assert "soflow.json cannot be written now" in complaint(next, again)
    other = Search("meanflow", folder=str(tmp_path), budget=TINY)
    assert len(list(other.run())) == 5  # another file of the folder is free
    assert len(list(running)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meanflow.json",
        "soflow.json",
    ]


def test_a_lock_ends_with_an_error(tmp_path):
    class Broken:
        key = dict.fromkeys(search.Trial("plane", "soflow", "", 0, 0, 1.0, None).key)

        def run(self):
            raise InputError("broken")

    for _ in range(2):
        assert complaint(next, bench(tmp_path / "rows.json", [Broken()])) == "broken"


# ------------------------------------------------------------------------ failures
def fails_with(message):
    def run_setting(setting, config, law):
        raise InputError(message)

    return run_setting


def test_a_training_that_diverges_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "warm_up", lambda where, method: None)
    message = "The loss is nan at step 7. Lower learning_rate."
    monkeypatch.setattr(search, "run_setting", fails_with(message))
    own = Search("soflow", folder=str(tmp_path), budget=TINY)
    rows = list(own.run())
    assert [row["failed"] for row in rows] == [message] * 2  # and nobody wins
    assert own.is_complete(own.stored())
    assert "no draw has lasted to the end" in search_table({"soflow": rows})


def test_another_complaint_stops_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "warm_up", lambda where, method: None)
    monkeypatch.setattr(search, "run_setting", fails_with("The batch is too small."))
    own = Search("soflow", folder=str(tmp_path), budget=TINY)
    assert complaint(next, own.run()) == "The batch is too small."
    assert own.stored() == []


def test_a_failed_seed_costs_a_candidate_its_place():
    rows = []
    for draw, errors in enumerate(([0.3, 0.3], [0.1, None], [0.2, 0.2])):
        rows += [{"draw": draw, "relative_rmse": [error]} for error in errors]
    assert search.ranked(rows) == [2, 0]


# ------------------------------------------------------------------------ the command
SHORT = ("--draws", "2", "--seconds", "1", "--longer", "1", "--steps", "20")
SHORT += ("--best", "1", "--seeds", "1", "--folder", "rows")


def test_the_command_searches_and_goes_on(tmp_path):
    words = ("bench", "search", "--methods", "soflow", *SHORT)
    done = soflow(*words, folder=tmp_path)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert [line.split(", ")[1] for line in lines[:5]] == STAGES
    assert "Equal CPU seconds" in done.out and "Equal steps" in done.out
    (path,) = (tmp_path / "rows").iterdir()
    rows = read_rows(path)
    assert len(rows) == 5 and rows[-1]["steps_done"] == 20
    command = "soflow bench search --where plane --methods soflow --folder rows"
    assert rows[0]["command"].startswith(f"{command} --draws 2")
    assert soflow(*words, folder=tmp_path).out == done.out


STRANGER = """
from soflow_edu.search import METHODS, Choice, Knob, Method

RATES = Knob("learning_rate", Choice((0.002, 0.004)))
METHODS["strange"] = Method("a stranger", {"name": "soflow"}, (RATES,))
"""


def test_a_strangers_method_is_searched(tmp_path, made_up):
    (tmp_path / "strange_method.py").write_text(STRANGER)
    words = ("bench", "search", "--methods", "strange", *SHORT)
    words += ("--import", "strange_method.py")
    try:
        done = soflow(*words, folder=tmp_path)
    finally:
        METHODS.pop("strange", None)
    assert done.status == 0, done.err
    assert "a stranger" in done.out and len(made_up) == 5


@pytest.mark.parametrize(
    "words, hint",
    [
        (("--methods", "soflo"), "soflow"),
        (("--where", "plain", "--methods", "soflow"), "plane"),
        (("--methods", "soflow", "--draws", "0"), "at least one of each"),
    ],
    ids=["method", "task", "budget"],
)
def test_what_cannot_be_searched_is_refused(words, hint, tmp_path):
    done = soflow("bench", "search", *words, folder=tmp_path)
    assert done.status == 2 and hint in done.err
    assert list(tmp_path.iterdir()) == []
