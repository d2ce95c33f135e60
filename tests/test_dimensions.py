"The benchmark in many dimensions: laws, truths, rows, standings, its command and page."

import json
import math

import pytest
import torch

import pages
from helpers import complaint, soflow
from soflow_edu import dimensions
from soflow_edu.config import load_config
from soflow_edu.core import find, names
from soflow_edu.dimensions import (
    PROBLEMS,
    DimensionJob,
    dimension_rows,
    recomputed,
    standings,
    standings_table,
    stored_rows,
    truth_of,
)
from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
from soflow_edu.odes import ExactFlow
from soflow_edu.paths import LinearPath, TrigPath
from soflow_edu.solution import rms
from soflow_edu.training import assemble

WITHOUT_FILES = [name for name in PROBLEMS if name != "patches-192"]
LAWS = [name for name in WITHOUT_FILES if name != "digits-64"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Truths are solved anew, of few noises."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(dimensions, "FRESH", 256)

    def few(name):
        return truth_of(name, 48, rtol=1e-5)

    monkeypatch.setattr(dimensions, "truth_in_use", few)


# ------------------------------------------------------------------------ laws
@pytest.mark.parametrize("name", LAWS)
def test_a_score_is_the_gradient_of_the_log_density(name):
    law = law_of(name)
    x, y = law.sample(6, torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 6).double()
    x = (x.double() + t[:, None]).requires_grad_()
    for labels in (None, y):
        total = law.log_density(x, t, LinearPath(), labels).sum()
        (gradient,) = torch.autograd.grad(total, x)
        score = law.score(x, t, LinearPath(), labels)
        torch.testing.assert_close(score, gradient, rtol=1e-5, atol=1e-8)


def test_without_planes_that_turn_it_is_the_mixture_of_chapter_distributions():
    law = law_of("mixture-8")
    axes = torch.eye(8).double().expand(8, 8, 8)[:, :, :3]
    turned = dimensions.TurnedMixture(law.means, law.stds, axes, law.weights)
    plain = GaussianMixture(law.means, law.stds, law.weights)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).double()
    for mine, theirs in zip(
        turned.posterior(x, 0.3, TrigPath()),
        plain.posterior(x, 0.3, TrigPath()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_queries_in_blocks_are_answered_as_one_by_one():
    law = law_of("mixture-512")
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(0)).double()
    t = torch.linspace(0.1, 0.9, 70).double()
    assert 2**24 // law.row_size < 70
    whole = law.velocity(x, t, LinearPath())
    part = law.velocity(x[66:68], t[66:68], LinearPath())
    torch.testing.assert_close(whole[66:68], part)


def test_the_geometry_is_the_same_for_everybody():
    "Numbers of the first problem, which no version may change unnoticed."
    law = law_of("mixture-2")
    ring = law.means.norm(dim=1)
    assert law.means.dtype == torch.float64
    assert ring.tolist() == pytest.approx(GEOMETRY, abs=1e-9)
    again = law_of("mixture-2")
    assert again.means.equal(law.means) and again.planes.equal(law.planes)


GEOMETRY = [
    1.389656258,
    1.651442114,
    1.578128982,
    0.559299179,
    0.764145366,
    0.847010746,
    1.393984254,
    2.130654323,
]


def test_a_data_root_without_photographs_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFLOW_DATA", str(tmp_path))
    said = complaint(law_of, "patches-192")
    assert "patches-192 needs CIFAR-10" in said and "Put them there" in said


def test_a_law_of_a_problem_is_found_by_its_name_and_no_other():
    assert law_of("mixture-32").description == "mixture-32"
    assert "Did you mean 'mixture-32'" in complaint(dimensions.problem_of, "mixtur-32")
    assert set(PROBLEMS) <= set(names("problem")) and len(PROBLEMS) == 13


# ------------------------------------------------------------------------ truths
@pytest.mark.parametrize("name", ["mixture-2", "mixture-32-many", "labelled-8"])
def test_a_truth_is_the_same_every_time_and_for_every_path(name, tmp_path):
    one = truth_of(name, 24, folder=tmp_path / "a")
    other = truth_of(name, 24, folder=tmp_path / "b")
    assert one.x0.equal(other.x0) and one.mark == other.mark
    flow = ExactFlow(law_of(name), TrigPath(), rtol=1e-10)
    ends = flow.solution(one.x1.double(), 1.0, 0.0, one.y)
    assert rms(ends - one.x0) < 1e-6 * rms(one.x0)


def test_a_truth_is_read_and_made_again_only_if_it_is_of_no_use(tmp_path):
    truth = truth_of("mixture-2", 8, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert truth.mark in file.name
    before = file.stat().st_mtime_ns
    truth_of("mixture-2", 8, folder=tmp_path)
    assert file.stat().st_mtime_ns == before
    truth_of("mixture-2", 9, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    file.write_bytes(b"damaged")
    assert truth_of("mixture-2", 8, folder=tmp_path).x0.equal(truth.x0)
    assert file.stat().st_mtime_ns != before


class Recalling:
    "A map that knows the ends of the first noises, and is wrong about one of them."

    path = LinearPath()

    def __init__(self, x0: torch.Tensor, wrong: torch.Tensor):
        self.x0 = torch.cat([x0[:-1], wrong])

    def __call__(self, x, t, s, y=None):
        return self.x0[torch.arange(len(x)) % len(self.x0)]


def test_the_exact_map_of_a_set_ends_in_the_set():
    law = law_of("digits-64")
    points = law.points.double()
    truth = truth_of("digits-64", 8, rtol=1e-3)
    gaps = torch.cdist(truth.x0, points)
    assert gaps.min(1).values.max() < 1e-6
    last = gaps[-1].argmin()
    wrong = points[int(last) - 1][None]
    found = dimensions.measured(Recalling(truth.x0, wrong), law, truth)
    assert found["neighbour"] == 7 / 8 and "share_error" not in found
    error = (wrong - truth.x0[-1:]).norm() / truth.x0.norm()
    assert found["error_1"] == pytest.approx(error.item())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_truth_against_a_tighter_solve(name):
    finite = isinstance(law_of(name), FiniteSet)
    n = 64
    truth = truth_of(name, n)
    tight = truth_of(name, n, rtol=1e-9 if finite else 1e-12)
    assert rms(truth.x0 - tight.x0) < 1e-6 * rms(tight.x0)


# ------------------------------------------------------------------------ references
@pytest.mark.parametrize("y", [None, 1])
def test_one_gaussian_is_the_exact_flow_of_its_law(y):
    law = law_of("labelled-8")
    config = dimensions.common(8, 4, 400, 0)
    f = dimensions.fit_gaussian(law, config, 4)
    x, labels = law.sample(100_000, torch.Generator().manual_seed(9))
    own = x[labels == 1]
    noise = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(8))
    ends = f(noise, 1.0, 0.0, torch.ones(len(noise)).long())
    assert (ends.mean(0) - own.mean(0)).abs().max() < 0.02
    assert (torch.cov(ends.T) - torch.cov(own.T)).abs().max() < 0.03
    half = f(f(noise, 1.0, 0.5), 0.5, 0.0)
    torch.testing.assert_close(half, f(noise, 1.0, 0.0), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------ entries
TRAINED = [name for name in dimensions.every_entry() if not find("entry", name).fit]


@pytest.mark.parametrize("problem", ["mixture-8", "labelled-8"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_entry_trains_to_a_finite_map(name, problem):
    row = DimensionJob("dimensions", problem, name, 10, None, 6).run()
    assert math.isfinite(row["error_1"]) and row["steps_done"] == 6
    assert sum(row["mode_errors"]) == pytest.approx(1)
    assert json.loads(json.dumps(row)) == row


def test_winners_change_an_entry_and_its_recipe(monkeypatch):
    entry = find("entry", "soflow")
    problem = PROBLEMS["mixture-8"]
    before = dimensions.recipe_of(entry, problem)
    monkeypatch.setitem(dimensions.WINNERS, "soflow", {"learning_rate": 5e-3})
    assert dimensions.configured(entry, problem, 5, 0).learning_rate == 5e-3
    assert dimensions.recipe_of(entry, problem) != before


def test_d32_says_its_law_by_name():
    config = load_config("d32")
    model, objective = assemble(config)
    assert law_of(config.data).shape == (32,)
    assert objective.learns == "map" and model.net.options["width"] == 384


# ------------------------------------------------------------------------ rows
FEW = ("still", "soflow")


def rows_in(folder, **changes) -> list[dict]:
    asked = {"problems": ("mixture-2",), "seeds": 2, "steps": 5} | changes
    return list(dimension_rows(folder, FEW, **asked))


def test_rows_are_gone_on_with_and_computed_again(tmp_path, monkeypatch):
    first = rows_in(tmp_path, seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(DimensionJob, "run", lambda job: pytest.fail("run twice"))
        assert rows_in(tmp_path, seeds=1) == json.loads(json.dumps(first))
    assert len(rows_in(tmp_path)) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "soflow.json",
        "still.json",
    ]
    found = recomputed(tmp_path, "soflow", "mixture-2", 11, steps=5)
    assert found.agrees and found.gap == 0
    said = complaint(recomputed, tmp_path, "soflow", "mixture-2", 12, steps=5)
    assert "no row of soflow" in said


def test_a_row_that_was_changed_by_hand_is_found_out(tmp_path):
    rows_in(tmp_path, seeds=1)
    file = tmp_path / "soflow.json"
    rows = json.loads(file.read_text())
    rows[0]["error_1"] *= 0.99
    file.write_text(json.dumps(rows))
    words = ["--folder", tmp_path, "--steps", 5, "--recompute"]
    done = soflow("bench", "dimensions", *words, "soflow", "mixture-2", 10)
    assert done.status == 1 and "differs" in done.out


def test_rows_of_other_settings_are_not_used(tmp_path, monkeypatch):
    rows_in(tmp_path, seeds=1)
    assert len(stored_rows(tmp_path, steps=5)) == 2
    monkeypatch.setitem(dimensions.WINNERS, "soflow", {"learning_rate": 5e-3})
    assert [row["setting"] for row in stored_rows(tmp_path, steps=5)] == ["still"]


def test_nothing_is_trained_before_all_names_are_known(tmp_path):
    def first(**asked):
        return next(dimension_rows(tmp_path, **asked))

    assert "Did you mean 'soflow'" in complaint(first, entries=["sofow"])
    assert "Unknown problem" in complaint(first, problems=["mixture-2", "plane"])
    assert "at least 1" in complaint(first, steps=0)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ standings
def row(entry: str, problem: str, error: float | None, seed: int = 10) -> dict:
    words = {"setting": entry, "label": entry.title(), "note": "", "dataset": problem}
    if error is None:
        return words | {"seed": seed, "failed": "it diverged"}
    return words | {"seed": seed, "error_1": error, "error_4": error}


def test_what_is_incomplete_or_diverged_stands_last():
    rows = [row("partial", name, 1e-6) for name in list(PROBLEMS)[:-1]]
    rows += [row("broken", name, 1e-5) for name in PROBLEMS]
    rows += [row("broken", "mixture-2", None, seed=11)]
    for name in PROBLEMS:
        rows += [row("worse", name, 0.5), row("better", name, 0.4)]
    order = standings(rows, seeds=1)
    assert [line.name for line in order] == ["better", "worse", "partial", "broken"]
    assert not standings(rows, seeds=2)[0].complete
    lines = standings_table(rows, seeds=1).splitlines()
    assert lines[1].startswith(" 1 Better") and lines[-1].endswith("(1 diverged)")


# ------------------------------------------------------------------------ command, page
METHOD = """
from soflow_edu.core import register
from soflow_edu.dimensions import Entry

setting = {"objective": {"name": "soflow", "lam": 0.25}}
register("entry", "mine_alone")(Entry("mine_alone", "a method of mine", setting))
"""


def test_a_method_of_ones_own_gets_its_line(tmp_path):
    (tmp_path / "my_lonely_method.py").write_text(METHOD)
    words = ["--problems", "mixture-2", "--seeds", 1, "--steps", 5, "--folder", "rows"]
    own = ["--import", "my_lonely_method.py", "--entries", "mine_alone"]
    done = soflow("bench", "dimensions", *own, *words, folder=tmp_path)
    assert done.status == 0, done.said
    assert " 1 a method of mine" in done.out
    assert len(json.loads((tmp_path / "rows/mine_alone.json").read_text())) == 1
    wrong = soflow(
        "bench", "dimensions", "--entries", "nobody", *words, folder=tmp_path
    )
    assert wrong.status == 2 and "Unknown entry" in wrong.err


def test_the_page_holds_a_table_of_the_rows(tmp_path, monkeypatch):
    assert "No rows are stored yet" in pages.standings_page(tmp_path)
    monkeypatch.setattr(dimensions, "STEPS", 5)
    asked = {"problems": ("mixture-2", "mixture-8"), "seeds": 2}
    list(dimension_rows(tmp_path, FEW, steps=5, **asked))
    rows = stored_rows(tmp_path, steps=5)
    monkeypatch.setattr(dimensions, "stored_rows", lambda folder: rows)
    page = pages.standings_page(tmp_path)
    error = next(line for line in standings(rows) if line.name == "still").error
    assert f"| - | stands still | {error:.3f} |" in page
    assert "| mixture-8 | " in page and "--recompute" in page and "nan" not in page
