"""Bounds hold for maps that are wrong in any way, and vanish for exact ones."""

import math

import pytest
import torch

from soflow_edu.comparing import wasserstein
from soflow_edu.core import InputError
from soflow_edu.distributions import GaussianMixture, law_of
from soflow_edu.errors import (
    eulerian_bound,
    eulerian_residual,
    fixed_point,
    lagrangian_bound,
    lagrangian_residual,
    law_bound,
    least_between,
    log_stretch,
    log_stretch_between_two,
    mode_shares,
    parting_rate,
    split_error,
)
from soflow_edu.flow_matching import MLP
from soflow_edu.odes import ExactFlow, integrate
from soflow_edu.paths import LinearPath, TrigPath
from soflow_edu.solution import SolutionModel

BOUNDS = pytest.mark.parametrize("bound", [eulerian_bound, lagrangian_bound])


def noise(n=64, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()


def random_model(seed, path="linear", coefficients="euler"):
    torch.manual_seed(seed)
    net = MLP(width=16, depth=3, x_waves=1, t_waves=2)
    torch.nn.init.normal_(net.outlet.weight, std=0.5)
    model = SolutionModel(net, path, coefficients).double()
    return model.requires_grad_(False)


def one_gaussian(path, std=0.5):
    "The flow of a Gaussian, and its exact map."
    law = GaussianMixture(torch.zeros(1, 2), std * torch.ones(1))

    def width(t):
        return (std**2 * path.alpha(t) ** 2 + path.beta(t) ** 2).sqrt()

    def exact(x, t, s):
        return x * (width(s) / width(t))[:, None]

    return ExactFlow(law, path), exact


def jumped(f, x, t, s):
    now = torch.full((len(x),), t).double()
    return f(x, now, torch.full_like(now, s))


# ------------------------------------------------------------------------- bounds
@BOUNDS
@pytest.mark.parametrize("name", ["eight_gaussians", "two_gaussians"])
@pytest.mark.parametrize("seed", range(2))
def test_no_error_of_a_random_model_is_above_its_bound(bound, name, seed):
    flow = ExactFlow(law_of(name), LinearPath())
    model = random_model(seed)
    for t, s in ((1.0, 0.0), (0.8, 0.3)):
        x = flow.solution(noise(seed=seed), 1.0, t)
        error = (model(x, t, s) - flow.solution(x, t, s)).norm(dim=1)
        assert error.median() > 0.05
        assert (error <= 1.01 * bound(model, flow, x, t, s)).all()


@BOUNDS
@pytest.mark.parametrize("path", [LinearPath(), TrigPath()])
def test_bounds_of_the_exact_map_vanish(bound, path):
    flow, exact = one_gaussian(path)
    assert bound(exact, flow, noise()).max() < 1e-9


@BOUNDS
def test_bounds_of_an_exact_map_by_a_solver_are_small(bound):
    flow = ExactFlow(law_of("eight_gaussians"), LinearPath())
    x = flow.solution(noise(16), 1.0, 0.9)

    def by_steps(x, t, s):
        return integrate(flow, x, t, s, method="rk4", steps=20).x

    assert bound(by_steps, flow, x, 0.9, 0.5, count=17).max() < 1e-3


@pytest.mark.parametrize("times", [(1.0, 0.0), (0.9, 0.4)])
def test_the_eulerian_bound_of_a_steady_fault_is_its_error(times):
    flow, exact = one_gaussian(LinearPath())

    def drifting(x, t, s):
        return exact(x, t, s) + (t - s)[:, None] * torch.tensor([0.3, -0.4])

    bound = eulerian_bound(drifting, flow, noise(), *times)
    error = 0.5 * (times[0] - times[1])
    torch.testing.assert_close(bound, torch.full_like(bound, error))
    assert law_bound(drifting, flow, noise()) == pytest.approx(0.5)


def test_a_rate_for_all_points_is_used_as_it_is():
    flow, exact = one_gaussian(LinearPath())

    def late(x, t, s):
        return exact(x, t, s) + (t - s)[:, None]

    def rate(times):
        return torch.full_like(times, 2.0)

    def none(times):
        return torch.zeros_like(times)

    grown = lagrangian_bound(late, flow, noise(), rate=rate)
    plain = lagrangian_bound(late, flow, noise(), rate=none)
    assert (grown > 1.5 * plain).all() and (grown < math.exp(2) * plain).all()


@pytest.mark.parametrize("seed", range(3))
def test_distance_of_laws_is_below_its_bound(seed):
    flow = ExactFlow(law_of("eight_gaussians"), LinearPath())
    model = random_model(seed)
    x1 = noise(128)
    truth = flow.solution(x1, 1.0, 0.0)
    error = (model(x1, 1.0, 0.0) - truth).norm(dim=1)
    distance = wasserstein(model(x1, 1.0, 0.0), truth)
    largest = law_bound(model, flow, x1)
    pointwise = eulerian_bound(model, flow, x1)
    assert distance <= error.pow(2).mean().sqrt() <= largest
    assert pointwise.pow(2).mean().sqrt() <= largest


@pytest.mark.parametrize("coefficients", ["euler", "trigonometric"])
def test_residuals_at_s_equal_t_are_differences_of_velocities(coefficients):
    flow = ExactFlow(law_of("eight_gaussians"), LinearPath())
    model = random_model(0, coefficients=coefficients)
    x = noise()
    t = torch.linspace(0.1, 0.9, 64).double()
    gap = model.velocity(x, t) - flow.velocity(x, t)
    rho = lagrangian_residual(model, flow.velocity, x, t, t)
    R = eulerian_residual(model, flow.velocity, x, t, t)
    torch.testing.assert_close(rho, gap)
    torch.testing.assert_close(R, -gap)


def test_parting_rate_is_that_of_the_fastest_neighbours():
    flow = ExactFlow(law_of("eight_gaussians"), LinearPath())
    x = noise(32)
    t = torch.linspace(0.2, 0.9, 32).double()
    rate = parting_rate(flow.velocity, x, t)
    seen = []
    for angle in torch.linspace(0, math.pi, 33).tolist():
        step = 1e-6 * torch.tensor([math.cos(angle), math.sin(angle)]).double()
        change = flow.velocity(x + step, t) - flow.velocity(x, t)
        seen.append(-(change * step).sum(1) / 1e-12)
    fastest = torch.stack(seen).amax(0)
    assert (fastest <= rate + 1e-4).all()
    torch.testing.assert_close(fastest, rate, rtol=0.02, atol=0.02)


# -------------------------------------------------------------- parts of the error
def test_one_step_error_is_at_most_the_sum_of_its_parts():
    flow = ExactFlow(law_of("two_gaussians"), LinearPath())
    for seed in range(3):
        parts = split_error(random_model(seed), flow, noise(128))
        assert 0 < parts["one step"] <= parts["own ODE"] + parts["gap"] + 1e-9
        assert parts["own ODE"] <= parts["one step"] + parts["gap"] + 1e-9


def test_fixed_point_comes_closer_in_proportion_to_r():
    flow = ExactFlow(law_of("two_gaussians"), TrigPath())
    x = noise(256)
    one = torch.ones(256).double()
    truth = flow.solution(x, 1.0, 0.0)
    errors = []
    for r in (0.08, 0.04, 0.02):
        end = fixed_point(flow.velocity, x, one, 0 * one, r)
        errors.append((end - truth).norm(dim=1).median())
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.7 < errors[1] / errors[2] < 2.4
    assert torch.equal(fixed_point(flow.velocity, x, one, one, 0.3), x)


@pytest.mark.parametrize("r", [0.0, -0.1, 1.5, math.nan])
def test_fixed_point_refuses_what_is_no_share(r):
    t = torch.ones(2)
    with pytest.raises(InputError, match="share"):
        fixed_point(random_model(0).velocity, torch.zeros(2, 2), t, 0 * t, r)


# ----------------------------------------------------------- stretch and bridges
@pytest.mark.parametrize("path", [LinearPath(), TrigPath()])
@pytest.mark.parametrize("ratio", [3.0, 20.0])
def test_stretch_is_the_ratio_of_densities_for_every_path(path, ratio):
    across = torch.tensor([0.6, 0.8]).double()
    along = torch.tensor([[-0.8, 0.6]]).double()
    half = 0.1 * ratio * across
    law = GaussianMixture(torch.stack([-half, half]), torch.full((2,), 0.2))
    flow = ExactFlow(law, path)
    logs = log_stretch(flow, torch.cat([along, -2 * along]), across)
    closed = log_stretch_between_two(0.2 * ratio, 0.2)
    assert logs.tolist() == pytest.approx([closed, closed], abs=1e-3)


def test_stretches_of_two_jumps_multiply():
    flow = ExactFlow(law_of("eight_gaussians"), LinearPath())
    angle = math.pi / 8
    x = torch.tensor([[math.cos(angle), math.sin(angle)]]).double()
    across = torch.tensor([-math.sin(angle), math.cos(angle)]).double()
    half_way = flow.solution(x, 1.0, 0.3)
    first = log_stretch(flow, x, across, 1.0, 0.3)
    second = log_stretch(flow, half_way, across, 0.3, 0.0)
    whole = log_stretch(flow, x, across)
    torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=1e-4)
    assert second > first > 0


def test_stretch_refuses_an_axis_that_is_no_mirror():
    flow = ExactFlow(law_of("two_gaussians"), LinearPath())  # of unequal weights
    with pytest.raises(InputError, match="mirror"):
        log_stretch(flow, torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, 0.0]))


def test_mode_shares_count_every_point_once():
    law = law_of("grid_gaussians")
    x, labels = law.sample(2000, torch.Generator().manual_seed(0))
    wide = mode_shares(x, law, width=100.0)
    assert wide[-1] == 0 and abs(wide.sum() - 1) < 1e-12
    narrow = mode_shares(x, law, width=1.0)
    assert narrow[-1] == pytest.approx(math.exp(-0.5), abs=0.05)
    counts = torch.bincount(labels, minlength=9) / 2000
    assert (mode_shares(x, law)[:9] - counts).abs().max() < 0.01


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_steeper_maps_may_leave_less_between(p):
    least = [least_between(p, 1.0, L) for L in (1.0, 10.0, 1e3, 1e6)]
    assert least == sorted(least, reverse=True) and 0 < least[-1] < 1e-6
    assert least_between(p, 2.0, 20.0) == pytest.approx(least[1])
    assert least[0] < 1 - p


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 1.0), (0.5, -1.0, 1.0), (0.5, 1.0, 0.0)])
def test_least_between_refuses_what_is_out_of_range(wrong):
    with pytest.raises(InputError, match="positive"):
        least_between(*wrong)
