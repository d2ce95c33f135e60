"The program: what it prints, writes, refuses and keeps."

import json

import pytest
import warm

NUMBERS_OF_DEMO = {
    "dataset",
    "seed",
    "steps",
    "train_seconds",
    "relative_rmse",
    "rmse",
    "median_error",
    "w2_one_step",
    "w2_floor",
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


def soflow(*words, folder, **environment):
    return warm.run("soflow", *words, cwd=folder, **environment)


def read_json(path):
    return json.loads(path.read_text())


def test_demo_writes_everything_and_keeps_earlier_runs(tmp_path):
    words = ("demo", "--seconds", "2", "--json", "copy.json")
    first = soflow(*words, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "relative_rmse" in first.stdout

    folder = tmp_path / "runs/demo"
    numbers = read_json(folder / "demo.json")
    assert set(numbers) == NUMBERS_OF_DEMO
    assert read_json(tmp_path / "copy.json") == numbers
    assert numbers["train_seconds"] < 5
    assert FILES_OF_DEMO <= {path.name for path in folder.iterdir()}

    words = ("demo", "--seconds", "1", "--dataset", "two_gaussians", "--seed", "3")
    second = soflow(*words, folder=tmp_path)
    assert second.returncode == 0, second.stderr
    assert read_json(tmp_path / "runs/demo-1/demo.json") == numbers
    assert read_json(folder / "demo.json")["seed"] == 3


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
    assert done.returncode == 2
    assert hint in done.stdout + done.stderr and "Traceback" not in done.stderr
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"letters", "letters/dear.txt", "file"}
