"The bench: every setting of every study trains, rows are written one by one and gone on with, and two claims about the objectives hold."
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from soflow_edu import objectives
from soflow_edu.config import load_config
from soflow_edu.core import InputError, find, names
from soflow_edu.distributions import law_of
from soflow_edu.objectives import as_key, bench, bench_table, jobs, read_rows, run_setting


@pytest.mark.parametrize("study", names("study"))
def test_every_setting_trains_to_a_finite_map(study):
    law, x1 = law_of("two_gaussians"), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for name, setting in find("study", study).items():
        setting = replace(setting, changes=setting.changes | {"batch": 128})
        model, took = run_setting(setting, replace(load_config("plane"), data="two_gaussians", seconds=None, steps=8), law)
        assert model(x1, 1.0, 0.0).isfinite().all() and took["steps_done"] == (4 if setting.teacher else 8) and 0.1 < took["memory_mb"] < 20, name


@pytest.fixture
def quick(monkeypatch):
    "A bench that judges by few points."
    monkeypatch.setattr(objectives, "judge", partial(objectives.judge, count=512, sets=1, most=256))


def test_rows_are_written_as_they_come_and_gone_on_with(tmp_path, monkeypatch, quick):
    path, todo = tmp_path / "rows.json", jobs("objectives", ["two_gaussians"], ["flow_matching", "semigroup"], seconds=2, seeds=1)
    first = next(bench(path, todo))
    assert [row["setting"] for row in read_rows(path)] == ["flow_matching"] and first["relative_rmse"][0] > first["relative_rmse"][3]
    rows = list(bench(path, todo))
    assert [row["setting"] for row in rows] == ["flow_matching", "semigroup"] and rows[0] == json.loads(json.dumps(first))
    monkeypatch.setattr(objectives.Job, "run", lambda job: pytest.fail("computed twice"))
    assert list(bench(path, todo)) == rows
    table = bench_table(rows)
    assert "two_gaussians" in table and "semigroup form" in table and f"{rows[1]['relative_rmse'][0]:.3f}" in table


def test_steps_make_a_bench_that_can_be_repeated(tmp_path, quick):
    "The same steps give the same numbers to the last digit; seconds and steps are different rows."
    todo = jobs("objectives", ["two_gaussians"], ["semigroup"], seeds=1, steps=20)
    first, again = (next(bench(tmp_path / name, todo)) for name in ("a.json", "b.json"))
    assert first["relative_rmse"] == again["relative_rmse"] and first["w2"] == again["w2"] and first["steps_done"] == 20
    assert as_key(todo[0].key) != as_key(jobs("objectives", ["two_gaussians"], ["semigroup"], seeds=1)[0].key) and "20 steps" in bench_table([first])


def test_a_bench_leaves_the_number_of_threads_alone(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(objectives.Job, "run", lambda job: seen.append(torch.get_num_threads()) or job.key)
    torch.set_num_threads(2)
    try:
        next(bench(tmp_path / "rows.json", jobs("objectives", seeds=1)))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_changed_recipe_is_another_row(monkeypatch):
    one, = jobs("objectives", settings=["soflow"], seeds=1)
    before = as_key(one.key)
    changed = replace(objectives.OBJECTIVES["soflow"], changes=objectives.OBJECTIVES["soflow"].changes | {"learning_rate": 0.5})
    monkeypatch.setitem(objectives.OBJECTIVES, "soflow", changed)
    assert as_key(one.key) != before


def test_bad_requests_are_refused(tmp_path):
    for arguments, hint in ((("objektives",), "objectives"), (("objectives", ["eight_gausians"]), "eight_gaussians"), (("objectives", ["two_moons"], ["mean_flow"]), "meanflow"), (("objectives", ["two_moons"], None, 0.5), "2 seconds")):
        with pytest.raises(InputError, match=hint):
            jobs(*arguments)
    other = tmp_path / "thesis.json"
    other.write_text('{"chapter": 1}')
    with pytest.raises(InputError, match="nothing was written"):
        next(bench(other, jobs("objectives", seeds=1)))
    assert other.read_text() == '{"chapter": 1}'


def test_judges_agree_with_the_truth():
    "The exact map as a model: no error at any number of jumps, and the W2 of the exact map."
    from soflow_edu.odes import ExactFlow
    from soflow_edu.paths import LinearPath
    flow = ExactFlow(law_of("two_gaussians"), LinearPath())
    class Exact:
        path, velocity = flow.path, staticmethod(flow.velocity)
        def __call__(self, x, t, s, y=None): return flow.solution(x, t, s)
    row = objectives.judge(Exact(), flow, "two_gaussians", count=512, sets=1, most=256)
    assert max(row["relative_rmse"]) < 1e-4 and abs(row["w2"]["jump"][0] - row["w2_exact"]) < 1e-4 and row["semigroup_defect"] < 1e-4
    assert min(row["precision_recall"]) > 0.8
