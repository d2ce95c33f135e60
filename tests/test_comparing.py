"A comparison refuses what it cannot measure, and its distances say their spread."

import pytest
import torch

from helpers import complaint
from soflow_edu import comparing
from soflow_edu.comparing import compare, energy_distance, sliced_wasserstein
from soflow_edu.core import build
from soflow_edu.distributions import FiniteSet, law_of
from soflow_edu.odes import ExactFlow, OdeFlow
from soflow_edu.paths import LinearPath
from soflow_edu.solution import SolutionModel

DISTANCES = ("w2", "sliced_w2", "energy")


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def test_a_misspelt_metric_is_refused():
    model = SolutionModel(build("network", "mlp"))
    flow = ExactFlow(law_of("two_moons", 50), LinearPath())
    assert "one_step" in complaint(compare, model, flow, metrics=("one_stp",))


# ------------------------------------------------------------------------- distances
def test_the_energy_distance_does_not_depend_on_blocks(monkeypatch):
    a = noise(70)
    b = noise(31, seed=1)
    whole = energy_distance(a, b)
    monkeypatch.setattr(comparing, "BLOCK", 16)
    assert energy_distance(a, b) == pytest.approx(whole, abs=1e-12)
    assert energy_distance(b, a) == pytest.approx(whole, abs=1e-12)


def test_the_energy_distance_of_two_pairs_by_hand():
    a = torch.tensor([[0.0], [1.0]])
    b = torch.tensor([[3.0], [7.0]])
    between = (3 + 7 + 2 + 6) / 4
    assert energy_distance(a, b) == pytest.approx(2 * between - 1 - 4)
    apart = torch.tensor([0, 1])  # one point of each class: it has no spread of its own
    by_class = energy_distance(a, b, apart, apart)
    assert by_class == pytest.approx(2 * between - 1 / 2 - 4 / 2)


def test_the_energy_distance_refuses_what_it_cannot_pair():
    assert "(0, 2)" in complaint(energy_distance, noise(0), noise(3))
    assert "(3, 1)" in complaint(energy_distance, noise(3)[:, :1], noise(3))
    assert "(3, 2)" in complaint(sliced_wasserstein, noise(3), noise(4))


def test_distances_take_pictures():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, 3, 4, 4, generator=generator)
    found = comparing.distances(a, a + 2.0)
    assert found["w2"] == pytest.approx(2 * 48**0.5, rel=1e-5)
    assert found["sliced_w2"] == pytest.approx(2.0, rel=0.2)  # over the root of 48
    assert comparing.distances(a, b)["energy"] < found["energy"]


# --------------------------------------------------------------------------- reports
@pytest.fixture(scope="module")
def moons() -> ExactFlow:
    return ExactFlow(law_of("two_moons", 200), LinearPath(), rtol=1e-4)


def test_every_distance_has_its_spread_and_its_fresh_sets(moons):
    report = compare(moons, moons, noise(64), metrics=("transport",))
    expected = []
    for name in DISTANCES:
        expected += [f"{name}_one_step", f"{name}_fresh"]
    assert [name for name in report.values if not name.endswith("_sd")] == expected
    assert all(report.values[f"{name}_sd"] > 0 for name in expected)
    assert report.table.count(" ± ") == len(expected)


def test_stratified_sets_scatter_less():
    flow = ExactFlow(law_of("eight_gaussians"), LinearPath(), rtol=1e-4)
    metrics = ("transport", "stratified")
    values = compare(flow, flow, noise(256), metrics=metrics).values
    for name in DISTANCES:
        drawn = values[f"{name}_fresh_sd"]
        assert values[f"stratified_{name}_fresh_sd"] < drawn / 3
        assert values[f"stratified_{name}_fresh"] < max(values[f"{name}_fresh"], drawn)


def test_data_have_the_classes_of_the_noise(moons):
    c = comparing.Comparison(moons, moons, noise(40))
    classes = comparing.classes_of(c)
    law = moons.distribution
    data = comparing.data_for(c, 40, classes, 1)
    for points in (c.truth, data):
        nearest = law.labels[torch.cdist(points, law.points).argmin(1)]
        assert torch.equal(nearest, classes)


def test_labelled_noise_is_stratified_by_its_labels():
    law = law_of("eight_gaussians")
    flow = ExactFlow(law, LinearPath(), rtol=1e-4)
    y = torch.arange(60) % 3
    metrics = ("transport", "stratified")
    values = compare(flow, flow, noise(60), y, metrics=metrics).values
    for name in DISTANCES:
        key = f"{name}_fresh"
        assert values[key] == values[f"stratified_{key}"]
    assert values["w2_fresh"] < 0.2  # with other labels it would be far above


def test_where_there_are_no_data_there_are_no_distances():
    model = SolutionModel(build("network", "mlp"))
    metrics = ("transport", "stratified", "evaluations")
    report = compare(model, OdeFlow(model), noise(16), metrics=metrics)
    assert not report.values
    assert report.results["evaluations_fresh"] is None
    assert all(row["w2"] is None for row in report.results["evaluations"])


@pytest.mark.parametrize("n", [1, 2])
def test_a_few_points_are_enough(n):
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    flow = ExactFlow(FiniteSet(points, torch.arange(6) % 2), LinearPath(), rtol=1e-4)
    x1 = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    report = compare(flow, flow, x1, metrics=("transport", "stratified"))
    assert all(torch.tensor(list(report.values.values())).isfinite())
