"The program: what it prints, writes, refuses and keeps."

import json

import pytest

from helpers import program, soflow

NUMBERS_OF_DEMO = {
    "dataset",
    "seed",
    "steps",
    "train_seconds",
    "relative_rmse",
    "rmse",
    "median_error",
    "w2_one_step",
    "w2_one_step_sd",
    "w2_fresh",
    "w2_fresh_sd",
    "sliced_w2_one_step",
    "sliced_w2_one_step_sd",
    "sliced_w2_fresh",
    "sliced_w2_fresh_sd",
    "energy_one_step",
    "energy_one_step_sd",
    "energy_fresh",
    "energy_fresh_sd",
    "semigroup_defect",
    "ode_residual",
    "evaluations",
}
FILES_OF_DEMO = {
    "config.yaml",
    "model.safetensors",
    "run.json",
    "log.csv",
    "table.txt",
    "figure.png",
}


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_demo_writes_everything_and_keeps_earlier_runs(tmp_path):
    words = ("demo", "--seconds", "2", "--json", "copy.json")
    first = program("soflow", *words, folder=tmp_path)
    assert first.status == 0, first.err
    assert "relative_rmse" in first.out

    folder = tmp_path / "runs/demo"
    numbers = read_json(folder / "demo.json")
    assert set(numbers) == NUMBERS_OF_DEMO
    assert read_json(tmp_path / "copy.json") == numbers
    assert numbers["train_seconds"] < 4  # two, and what a first run loads
    assert FILES_OF_DEMO <= {path.name for path in folder.iterdir()}

    words = ("demo", "--seconds", "1", "--dataset", "two_gaussians", "--seed", "3")
    second = soflow(*words, folder=tmp_path)
    assert second.status == 0, second.err
    assert read_json(tmp_path / "runs/demo-1/demo.json") == numbers
    assert read_json(folder / "demo.json")["seed"] == 3


@pytest.mark.slow
def test_a_demo_keeps_its_budget(tmp_path):
    done = program("soflow", "demo", "--seconds", "10", folder=tmp_path)
    assert done.status == 0, done.err
    numbers = read_json(tmp_path / "runs/demo/demo.json")
    assert 9.8 < numbers["train_seconds"] < 10.1


REFUSED = [
    (("demo", "--dataset", "eight_gausians"), "eight_gaussians"),
    (("demo", "--seconds", "-3"), "--seconds"),
    (("demo", "--seconds", "soon"), "--seconds"),
    (("demo", "--datset", "two_moons"), "--dataset"),
    (("demo", "--out", "letters"), "not empty"),
    (("demo", "--out", "file"), "is a file"),
    (("demo", "--json", "letters"), "folder"),
    (("dmeo",), "demo"),
    (("demo", "--seed", "-1"), "seed"),
]


@pytest.mark.parametrize(
    "words, hint", REFUSED, ids=[" ".join(words) for words, _ in REFUSED]
)
def test_bad_input_ends_with_status_2_and_no_traceback(tmp_path, words, hint):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("friend")
    (tmp_path / "file").write_text("text")
    done = soflow(*words, folder=tmp_path)
    assert done.status == 2
    assert hint in done.said and "Traceback" not in done.err
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"letters", "letters/dear.txt", "file"}


def test_a_real_process_ends_with_the_same_status_and_words(tmp_path):
    words = ("demo", "--dataset", "eight_gausians")
    real = program("soflow", *words, folder=tmp_path)
    same = soflow(*words, folder=tmp_path)
    assert real.status == same.status == 2 and real.err == same.err


def test_list_prints_kinds_names_and_options(tmp_path):
    kinds = soflow("list")
    assert kinds.status == 0 and "network" in kinds.out
    networks = soflow("list", "network")
    assert "mlp" in networks.out and "flow_matching" in networks.out
    options = soflow("list", "network", "mlp")
    assert "width" in options.out and "of a hidden layer" in options.out
    assert max(len(line) for line in options.out.splitlines()) <= 100
    wrong = soflow("list", "network", "mpl")
    assert wrong.status == 2 and "Did you mean 'mlp'?" in wrong.err


OWN = """
from dataclasses import dataclass

from soflow_edu.core import register
from soflow_edu.paths import LinearPath


@register("path", "own_line")
@dataclass(frozen=True)
class OwnLine(LinearPath):
    "A path of my own."
"""


@pytest.mark.slow
def test_own_components_are_found_by_every_command(tmp_path):
    "A path in a file of one's own trains, is loaded, sampled and judged."
    (tmp_path / "my_line.py").write_text(OWN)
    own = ("--import", "my_line.py")
    words = ("train", "plane", "path=own_line", "steps=2", "batch=64", "--out", "run")
    done = program("soflow", *own, *words, folder=tmp_path)
    assert done.status == 0, done.said
    again = program("soflow", "evaluate", "run", folder=tmp_path)
    assert again.status == 0 and "relative" in again.out, again.said
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lost = program("soflow", "evaluate", "../run", folder=elsewhere)
    assert lost.status == 2 and "my_line.py" in lost.err and "--import" in lost.err
    given = ("--import", "../my_line.py")
    found = program("soflow", "evaluate", "../run", *given, folder=elsewhere)
    assert found.status == 0, found.said
