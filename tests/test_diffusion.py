"""Diffusion networks, stochastic equations and EDM's coefficients beside the flows,
solvers and trainings of other chapters."""

from math import isfinite

import pytest
import torch

from helpers import complaint, train_to_end
from soflow_edu.config import make_config
from soflow_edu.core import build
from soflow_edu.diffusion import (
    Predictor,
    VarianceExploding,
    VariancePreserving,
    carry,
    convert,
    diffuse,
    plain_strength,
)
from soflow_edu.distributions import FiniteSet, law_of
from soflow_edu.odes import ExactFlow, OdeFlow
from soflow_edu.paths import LinearPath, TrigPath
from soflow_edu.training import assemble

LINEAR = LinearPath()
LAW = law_of("eight_gaussians")
FLOW = ExactFlow(LAW, LINEAR)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score_on(path, law=LAW):
    "A score network without fault."

    def score(x, t, y=None):
        return law.score(x, t, path, y)

    return score


# ------------------------------------------------------------------------ predictors
@pytest.mark.parametrize("own", [LINEAR, TrigPath()], ids=["linear", "trigonometric"])
def test_a_predictor_hands_labels_to_its_network(own):
    x1 = normal(40, 2).double()
    y = torch.arange(40) % 8
    flow = OdeFlow(Predictor(score_on(own), "linear", "score", own), rtol=1e-7)
    exact = FLOW.solution(x1, 1.0, 0.0, y)
    torch.testing.assert_close(flow.solution(x1, 1.0, 0.0, y), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", [VariancePreserving(), VarianceExploding()], ids=str)
def test_a_network_of_a_diffusion_model_answers_in_float32(own):
    x1 = normal(60, 2)
    flow = OdeFlow(Predictor(score_on(own), "linear", "score", own))
    end = flow.solution(x1, 1.0, 0.0)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, FLOW.solution(x1, 1.0, 0.0), rtol=0, atol=2e-3)


def test_a_predictor_takes_pictures():
    pictures = FiniteSet(normal(30, 3, 4, 4))
    x = normal(8, 3, 4, 4, seed=1)
    t = torch.linspace(0.1, 0.9, 8)
    field = Predictor(score_on(LINEAR, pictures), predicts="score")
    exact = pictures.velocity(x, t, LINEAR)
    torch.testing.assert_close(field.velocity(x, t), exact, rtol=1e-4, atol=1e-4)


def test_a_predictor_is_not_asked_outside_its_times():
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    field = Predictor(model, t_min=0.1, t_max=0.8)
    field.velocity(normal(3, 2), torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(seen[0], torch.tensor([0.1, 0.5, 0.8]))


# ------------------------------------------------------------------------ paths
def test_a_point_that_goes_to_another_path_and_back_is_itself():
    x = normal(50, 2)
    t = torch.linspace(0, 0.98, 50)
    for other in (TrigPath(), VariancePreserving(), VarianceExploding()):
        there, when = carry(x, t, LINEAR, other)
        again, then = carry(there, when, other, LINEAR)
        torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(then, t, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ noise
def test_kicks_repeat_with_their_generator_and_labels_lead_to_their_class():
    x1 = normal(80, 2)
    y = torch.arange(80) % 8
    ends = []
    for _ in range(2):
        kicks = torch.Generator().manual_seed(3)
        way = diffuse(FLOW, x1, 1.0, 0.0, y, strength=2.0, steps=60, generator=kicks)
        ends.append(way.x)
    assert torch.equal(*ends)
    assert torch.equal(torch.cdist(ends[0], LAW.means).argmin(1), y)
    assert way.states.shape == (61, 80, 2) and way.times.shape == (61, 80)


def test_a_start_of_its_own_time_is_kept():
    x = normal(3, 2)
    t = torch.tensor([1.0, 0.5, 0.2])
    way = diffuse(FLOW, x, t, t, steps=5)
    assert torch.equal(way.x, x)


# ------------------------------------------------------------------------ coefficients
EDM = {"name": "edm", "sigma_data": 1.42}


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_a_map_with_the_coefficients_of_edm_trains(path):
    coefficients = EDM | {"path": path}
    settings = {"path": path, "coefficients": coefficients, "steps": 60}
    config = make_config({"objective": "semigroup", "network": "mlp"} | settings)
    last = train_to_end(config, LAW)
    model = last.run.model
    assert isfinite(last.loss)
    assert model.coefficients == build("coefficients", coefficients)
    x = normal(20, 2)
    assert torch.equal(model(x, 0.6, 0.6), x)
    assert model.spec()["coefficients"]["sigma_data"] == 1.42


def test_a_map_with_the_coefficients_of_edm_starts_at_the_best_line():
    "An untrained network says nothing, and what is left is a x."
    config = make_config({"network": "mlp", "coefficients": EDM})
    model, _ = assemble(config)
    x = normal(20, 2)
    torch.testing.assert_close(model(x, 1.0, 0.0), torch.zeros(20, 2))
    line = (1 - 0.5) * 1.42**2 / (0.25 * 1.42**2 + 0.25)
    torch.testing.assert_close(model(x, 0.5, 0.0), line * x)


# ------------------------------------------------------------------------ refusals
X = torch.zeros(4, 2)
REFUSED = {
    "a face": ((X, X, 0.5, LINEAR, "nois", "data"), "Did you mean 'noise'"),
    "a shape": ((X[:3], X, 0.5, LINEAR, "noise", "data"), "shapes must be equal"),
    "a count": ((X, X, torch.ones(3), LINEAR, "noise", "data"), "4 samples"),
    "a time": ((X, X, 1.2, LINEAR, "noise", "data"), "[0, 1]"),
    "an end": ((X, X, 1.0, LINEAR, "noise", "velocity"), "alpha is zero"),
    "a start": ((X, X, 0.0, TrigPath(), "velocity", "score"), "beta is zero"),
    "whole numbers": ((X.long(), X.long(), 0.5, LINEAR, "data", "noise"), "int64"),
}


@pytest.mark.parametrize("given, hint", REFUSED.values(), ids=REFUSED)
def test_conversions_refuse_what_they_cannot_answer(given, hint):
    assert hint in complaint(convert, *given)


def test_noise_without_end_and_steps_without_number_are_refused():
    plain = plain_strength(LINEAR)
    assert "finite" in complaint(diffuse, FLOW, X, 1.0, 0.0, strength=plain)
    assert "not negative" in complaint(diffuse, FLOW, X, 1.0, 0.0, strength=-1.0)
    assert "at least 1" in complaint(diffuse, FLOW, X, 1.0, 0.0, steps=0)
    assert "no path" in complaint(diffuse, LAW, X, 1.0, 0.0)
    assert "never has" in complaint(carry, X, 1.0, LINEAR, VarianceExploding())
