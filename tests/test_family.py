"The family of objectives: at rest on an exact map, in every precision, for all rows."

import pytest
import torch
from torch import nn

from helpers import complaint
from soflow_edu.core import build
from soflow_edu.distributions import law_of
from soflow_edu.flow_matching import MLP, Batch
from soflow_edu.solution import SolutionModel
from soflow_edu.training import generator_of

TO_ALL_ENDS = ("lagrangian", "lagrangian_steps", "improved_meanflow", "midway")
TO_DATA = ("easy_consistency", "continuous_consistency")
NEW = (*TO_ALL_ENDS, *TO_DATA, "alpha_flow")


class Standing(nn.Module):
    "The network of the map of a law that stays where it is: N(0, I) on the circle."

    def forward(self, x, t, d):
        return 0 * x * t[:, None]


@pytest.fixture
def still():
    "A map that stands still, which is exact where data and noise are the same law."
    return SolutionModel(Standing(), "trigonometric", "euler")


@pytest.fixture
def batch():
    x0, y = law_of("eight_gaussians").sample(64, generator_of(0, 0))
    return Batch(x0, y)


def stats(name, model, batch, progress=0.5, **options):
    objective = build("objective", {"name": name} | options)
    draws = objective.draw(batch, progress, generator_of(0, 1))
    return objective.loss(model, batch, draws, progress).stats


@pytest.mark.parametrize("name", [*NEW, "meanflow", "semigroup"])
def test_an_exact_map_of_the_trigonometric_path_is_at_rest(name, still, batch):
    knows = {"name": "exact", "flow": still}
    found = stats(name, still, Batch(batch.x0), progress=1.0, target=knows)
    assert all(float(value) < 1e-12 for value in found.values())


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("coefficients", ["euler", "trigonometric"])
def test_losses_are_finite_for_the_shortest_jumps(name, coefficients, batch):
    model = SolutionModel(MLP(), coefficients=coefficients)
    nn.init.normal_(model.net.outlet.weight)
    objective = build("objective", {"name": name, "lam": 0.0})
    batch = Batch(batch.x0)
    draws = objective.draw(batch, 0.9, generator_of(0, 2))
    draws.s[:32] = draws.t[:32] - 1e-4
    draws.l = torch.minimum(torch.maximum(draws.l, draws.s), draws.t - 1e-4)
    if name == "lagrangian_steps":
        draws.l = draws.t.clone()
    loss = objective.loss(model, batch, draws, 0.9).value
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NEW)
def test_candidates_are_not_trained_on(name, batch):
    objective = build("objective", {"name": name, "trained": 16, "target": "batch"})
    model = SolutionModel(MLP(classes=8))
    draws = objective.draw(batch, 0.5, generator_of(0, 3))
    assert len(draws.t) == len(draws.x1) == 16
    assert objective.loss(model, batch, draws, 0.5).value.isfinite()


def test_the_step_in_s_keeps_its_digits_in_bfloat16(batch):
    model = SolutionModel(MLP())
    nn.init.normal_(model.net.outlet.weight)
    objective = build("objective", {"name": "lagrangian_steps", "lam": 0.0})
    batch = Batch(batch.x0)
    draws = objective.draw(batch, 0.5, generator_of(0, 4))
    slopes = []
    for precision in ("float32", "bfloat16"):
        model.precision = precision
        value = objective.loss(model, batch, draws, 0.5).value
        slopes.append(torch.autograd.grad(value, model.net.inlet.weight)[0])
    # only the velocity, which is a target, is of bfloat16
    assert (slopes[0] - slopes[1]).norm() < 0.02 * slopes[0].norm()


@pytest.mark.parametrize(
    "name, options, hint",
    [
        ("lagrangian_steps", {"step_share": 1.5}, "(0, 1]"),
        ("easy_consistency", {"base": 1.0}, "above 1"),
        ("alpha_flow", {"schedule": {"name": "logistic", "start": 1.0}}, "start"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, options, hint):
    assert hint in complaint(build, "objective", {"name": name} | options)
