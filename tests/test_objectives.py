"The bench: settings train, rows are written one by one and kept when it is resumed."

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import complaint
from soflow_edu import objectives
from soflow_edu.config import load_config
from soflow_edu.core import build, catalogue, find, names
from soflow_edu.distributions import law_of
from soflow_edu.flow_matching import Batch, Draws
from soflow_edu.objectives import (
    Trajectories,
    as_key,
    bench,
    bench_table,
    jobs,
    read_rows,
    run_setting,
)
from soflow_edu.odes import ExactFlow
from soflow_edu.paths import LinearPath
from soflow_edu.soflow import rows_of
from soflow_edu.solution import SolutionModel

# ------------------------------------------------------------------------ settings
EVERY_SETTING = []
for study in names("study"):
    EVERY_SETTING += [(study, setting) for setting in find("study", study)]


@pytest.mark.parametrize("study, name", EVERY_SETTING)
def test_a_setting_trains_to_a_finite_map(study, name):
    law = law_of("two_gaussians")
    x1 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    setting = find("study", study)[name]
    small = replace(setting, changes=setting.changes | {"batch": 128})
    config = load_config("plane")
    config = replace(config, data="two_gaussians", seconds=None, steps=8)
    model, took = run_setting(small, config, law)
    assert model(x1, 1.0, 0.0).isfinite().all()
    assert took["steps_done"] == (4 if setting.teacher else 8)
    assert 0.1 < took["memory_mb"] < 20


# ------------------------------------------------------------------------ rows
@pytest.fixture
def quick(monkeypatch):
    "A bench that judges by few points."
    judge = partial(objectives.judge, count=512, sets=1, most=256)
    monkeypatch.setattr(objectives, "judge", judge)


def settings_of(rows: list[dict]) -> list[str]:
    return [row["setting"] for row in rows]


def test_rows_are_written_as_they_come_and_gone_on_with(tmp_path, monkeypatch, quick):
    path = tmp_path / "rows.json"
    chosen = ["flow_matching", "semigroup"]
    todo = jobs("objectives", ["two_gaussians"], chosen, seconds=2, seeds=1)
    first = next(bench(path, todo))
    assert settings_of(read_rows(path)) == ["flow_matching"]
    assert first["relative_rmse"][0] > first["relative_rmse"][3]
    rows = list(bench(path, todo))
    assert settings_of(rows) == chosen
    assert rows[0] == json.loads(json.dumps(first))
    monkeypatch.setattr(objectives.Job, "run", lambda job: pytest.fail("run twice"))
    assert list(bench(path, todo)) == rows
    table = bench_table(rows)
    assert "two_gaussians" in table and "semigroup form" in table
    assert f"{rows[1]['relative_rmse'][0]:.3f}" in table


def test_a_second_bench_at_the_same_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives.Job, "run", lambda job: job.key)
    path = tmp_path / "rows.json"
    todo = jobs("objectives", seeds=1)
    running = bench(path, todo)
    next(running)
    assert "rows.json cannot be written now" in complaint(next, bench(path, todo))
    assert len(read_rows(path)) == 1
    running.close()
    assert len(list(bench(path, todo))) == len(todo)
    assert [found.name for found in tmp_path.iterdir()] == ["rows.json"]


def test_steps_make_a_bench_that_can_be_repeated(tmp_path, quick):
    "The same steps give the same numbers to the last digit."
    study = ("objectives", ["two_gaussians"], ["semigroup"])
    todo = jobs(*study, seeds=1, steps=20)
    first = next(bench(tmp_path / "a.json", todo))
    again = next(bench(tmp_path / "b.json", todo))
    assert first["relative_rmse"] == again["relative_rmse"]
    assert first["w2"] == again["w2"]
    assert first["steps_done"] == 20
    assert "20 steps" in bench_table([first])


def test_seconds_and_steps_are_different_rows():
    study = ("objectives", ["two_gaussians"], ["semigroup"])
    (by_steps,) = jobs(*study, seeds=1, steps=20)
    (by_seconds,) = jobs(*study, seeds=1)
    assert as_key(by_steps.key) != as_key(by_seconds.key)


def test_a_bench_leaves_the_number_of_threads_alone(tmp_path, monkeypatch):
    seen = []

    def note_threads(job):
        seen.append(torch.get_num_threads())
        return job.key

    monkeypatch.setattr(objectives.Job, "run", note_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        next(bench(tmp_path / "rows.json", jobs("objectives", seeds=1)))
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_changed_recipe_is_another_row(monkeypatch):
    (job,) = jobs("objectives", settings=["soflow"], seeds=1)
    before = as_key(job.key)
    setting = objectives.OBJECTIVES["soflow"]
    faster = replace(setting, changes=setting.changes | {"learning_rate": 0.5})
    monkeypatch.setitem(objectives.OBJECTIVES, "soflow", faster)
    assert as_key(job.key) != before


class ExactMap:
    "The exact map in the place of a model."

    def __init__(self, flow: ExactFlow):
        self.path = flow.path
        self.velocity = flow.velocity
        self.solution = flow.solution

    def __call__(self, x, t, s, y=None):
        return self.solution(x, t, s)


def test_judges_find_no_fault_with_the_truth():
    "No error at any number of jumps, and the W2 of the exact map."
    flow = ExactFlow(law_of("two_gaussians"), LinearPath())
    exact = ExactMap(flow)
    few = {"count": 512, "sets": 1, "most": 256}
    row = objectives.judge(exact, flow, "two_gaussians", **few)
    assert max(row["relative_rmse"]) < 1e-4
    assert abs(row["w2"]["jump"][0] - row["w2_exact"]) < 1e-4
    assert row["semigroup_defect"] < 1e-4
    assert min(row["precision_recall"]) > 0.8


# ------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "asked, hint",
    [
        (("objektives",), "objectives"),
        (("objectives", ["eight_gausians"]), "eight_gaussians"),
        (("objectives", ["two_moons"], ["mean_flow"]), "meanflow"),
        (("objectives", ["two_moons"], None, 0.5), "2 seconds"),
    ],
    ids=["study", "data set", "setting", "seconds"],
)
def test_a_study_that_cannot_be_run_is_refused(asked, hint):
    assert hint in complaint(jobs, *asked)


def test_a_file_that_holds_no_rows_is_left_as_it_is(tmp_path):
    other = tmp_path / "thesis.json"
    other.write_text('{"chapter": 1}')
    rows = bench(other, jobs("objectives", seeds=1))
    assert "nothing was written" in complaint(next, rows)
    assert other.read_text() == '{"chapter": 1}'


@pytest.mark.parametrize(
    "options, hint",
    [
        ({"until": 1.0}, "must lie between 0 and 1"),
        ({"then": "soflw"}, "soflow"),
    ],
    ids=["until", "then"],
)
def test_stages_that_cannot_follow_each_other_are_refused(options, hint):
    assert hint in complaint(build, "objective", {"name": "staged"} | options)


# ------------------------------------------------------------- objectives by networks
SMALL_PICTURES = {"size": 8, "channels": 2, "classes": 3}
NETWORKS = {
    "mlp": {"dim": 2, "classes": 3},
    "conv": SMALL_PICTURES | {"width": 8},
    "dit": SMALL_PICTURES | {"patch": 2, "width": 16, "depth": 1, "heads": 2},
    "unet": SMALL_PICTURES
    | {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8, 4)},
}


class Anything:
    "Points or pictures with labels."

    def __init__(self, shape):
        self.shape = shape
        self.classes = 3

    def sample(self, n, generator):
        x = torch.randn(n, *self.shape, generator=generator)
        return x, torch.randint(3, (n,), generator=generator)


def small_model(name):
    "A small network whose output is not zero, and the shape of what it takes."
    torch.manual_seed(0)
    network = build("network", {"name": name} | NETWORKS[name])
    for p in network.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    shape = (2,) if name == "mlp" else (2, 8, 8)
    return SolutionModel(network), shape


TAUGHT = ("reflow", "regression")  # by trajectories of points without labels


def objective_of(name, model, shape):
    "An objective; those that learn from trajectories have some of the model itself."
    if name not in TAUGHT:
        return build("objective", name)
    pool = Trajectories(model, shape, count=8, records=3, rtol=1e-1)
    return find("objective", name)(trajectories=pool)


def test_every_network_is_tried_with_every_objective():
    assert set(NETWORKS) == set(catalogue()["network"])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("objective", names("objective"))
def test_every_objective_trains_every_network(objective, network):
    model, shape = small_model(network)
    chosen = objective_of(objective, model, shape)
    g = torch.Generator().manual_seed(0)
    for progress in (0.0, 0.9):
        x0, y = Anything(shape).sample(6, g)
        batch = Batch(x0, None if objective in TAUGHT else y)
        draws = chosen.draw(batch, progress, g)
        loss = chosen.loss(model, batch, draws, progress)
        loss.value.backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        assert loss.value.isfinite()
        assert all(slope.isfinite().all() for slope in slopes)
        assert any(slope.abs().max() > 0 for slope in slopes)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_derivative_along_the_velocity_is_that_of_differences(network):
    model, shape = small_model(network)
    model.double().eval()  # without dropout
    x0, y = Anything(shape).sample(4, torch.Generator().manual_seed(1))
    x1 = torch.randn_like(x0).double()
    t = torch.linspace(0.3, 0.9, 4).double()
    draws = Draws(x1, t, t / 2, t, regressed=0)
    rows = rows_of(model, Batch(x0.double(), y), draws)
    _, q = objectives.derivative_along(model, rows, rows.v_cond)
    step = 3e-3  # some networks compute in float32 whatever they are given

    def moved(by):
        return model(rows.xt + by * rows.v_cond, rows.t + by, rows.s, rows.y)

    expected = (moved(step) - moved(-step)) / (2 * step)
    error = (q - expected.detach()).norm() / expected.norm()
    assert error < 0.01, error
