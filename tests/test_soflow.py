"The two losses of SoFlow: whatever path, inputs and labels, and at short jumps."

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from helpers import GUIDED, SamplesOnly, complaint, train_to_end
from soflow_edu.comparing import compare
from soflow_edu.config import load_config
from soflow_edu.core import build
from soflow_edu.distributions import law_of
from soflow_edu.flow_matching import Batch
from soflow_edu.odes import ExactFlow
from soflow_edu.soflow import Rows, output_ahead
from soflow_edu.solution import SolutionModel
from soflow_edu.training import trained

# ------------------------------------------------------------------------ paths
SHORT = {
    "name": "soflow",
    "schedule": {"name": "exponential", "r_init": 1.0, "r_end": 0.05},
}
PATHS = ("linear", "trigonometric")
COEFFICIENTS = ("euler", "trigonometric")


def name_of(part: str | dict) -> str:
    return part if isinstance(part, str) else part["name"]


QUICK = ("trigonometric", "euler", SHORT)
PAIRS = [*product(PATHS, COEFFICIENTS, (SHORT, "semigroup")), ("linear", "data", SHORT)]
LONG = [pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair != QUICK]


@pytest.mark.parametrize("path, coefficients, objective", [QUICK, *LONG], ids=name_of)
def test_every_pair_of_path_and_coefficients_trains(path, coefficients, objective):
    config = replace(
        load_config("plane"),
        path=path,
        coefficients=coefficients,
        objective=objective,
        steps=600,
        seconds=None,
        batch=256,
        learning_rate=4e-3,
    )
    law = law_of("eight_gaussians")
    step = train_to_end(config, SamplesOnly(law))
    flow = ExactFlow(law, build("path", path))
    report = compare(trained(step.run), flow, metrics=("one_step",))
    assert report.values["relative_rmse"] < 0.4


# ------------------------------------------------------------------------ inputs
class NeedsAnAngle(nn.Module):
    "A network that fails without its extra input, of the right rows."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x, t, d, y=None, *, angle):
        assert angle.shape == t.shape
        assert torch.equal(angle.round(), angle)
        times = torch.stack([t, d, angle], 1)
        return self.layer(torch.cat([x, times], 1))


WITH_EXTRAS = [
    "flow_matching",
    {"name": "soflow", "target": "conditional", "lam": 0.4},
    {"name": "soflow", "target": "own", "lam": 0.4},
    {"name": "semigroup", "target": "conditional", "lam": 0.4},
    {"name": "semigroup", "target": "own", "lam": 0.4},
]


@pytest.mark.parametrize("description", WITH_EXTRAS, ids=str)
def test_extra_inputs_reach_every_call_of_the_network(description):
    model = SolutionModel(NeedsAnAngle())
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(20, 2, generator=generator)
    batch = Batch(x0, extras={"angle": torch.arange(20.0)})
    objective = build("objective", description)
    draws = objective.draw(batch, 0.5, generator)
    loss = objective.loss(model, batch, draws, 0.5)
    loss.value.backward()
    assert loss.value.isfinite()
    assert model.net.layer.weight.grad.abs().sum() > 0


class Spy(nn.Module):
    "A network of three classes that keeps the labels of every call."

    classes = 3

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t, d, y=None):
        self.seen.append(y.clone())
        return x


def test_hidden_labels_are_the_null_label_in_every_call():
    """The network never sees the label of a row that was drawn as hidden, nor the null
    label elsewhere, but for the velocity of all data."""
    spy = Spy()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(400, 2, generator=generator)
    batch = Batch(x0, torch.arange(400) % 3)
    objective = build("objective", GUIDED)
    draws = objective.draw(batch, 0.5, generator)
    objective.loss(SolutionModel(spy), batch, draws, 0.5)
    assert 20 < draws.dropped.sum() < 70
    n = draws.regressed
    null = torch.full((400,), 3)
    labels = torch.where(draws.dropped, null, batch.y)
    expected = {
        "guided step, under both labels": torch.cat([null[n:], labels[n:]]),
        "look ahead": labels[n:],
        "the call with gradient": labels,
        "guided regression": null[:n],
    }
    assert len(spy.seen) == len(expected)
    for seen, (call, known) in zip(spy.seen, expected.items(), strict=True):
        assert torch.equal(seen, known), call


# ------------------------------------------------------------------------ digits
def awake_network() -> nn.Module:
    "A network that does not answer zero."
    torch.manual_seed(0)
    net = build("network", "mlp")
    nn.init.normal_(net.outlet.weight)
    return net


def short_jumps(kind: torch.dtype) -> tuple[SolutionModel, Rows]:
    "A model, and rows that jump by 0.002, with x_l after a tenth of the way."
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(512, 2, generator=generator).to(kind)
    x1 = torch.randn(512, 2, generator=generator).to(kind)
    half = torch.full((512,), 0.5)
    t = half.to(kind)
    s = (half - 0.002).to(kind)
    l = (half - 0.0002).to(kind)
    model = SolutionModel(awake_network().to(kind))
    xt, v = model.path.interpolate(x0, x1, t)
    return model, Rows(xt, v, t, s, l)


def loss_of_short_jumps(kind: torch.dtype) -> torch.Tensor:  # (512,) in float64
    model, rows = short_jumps(kind)
    v = rows.v_cond
    F = model.F(rows.xt, rows.t, rows.s)
    F_ahead = output_ahead(model, rows, v)
    objective = build("objective", "soflow", lam=0.0)
    loss = objective.solution_loss(model, rows, F, v, F_ahead)
    return loss.weighted.double()


def test_the_loss_keeps_its_digits_for_short_jumps():
    """In float32 the loss of short jumps is closer to that of float64 than a difference
    of two maps could be."""
    exact = loss_of_short_jumps(torch.float64)
    single = loss_of_short_jumps(torch.float32)
    error = (single - exact).norm() / exact.norm()
    assert error < 1.5e-5


# ------------------------------------------------------------------------ refusals
def test_a_misspelt_schedule_is_refused():
    assert "cosine" in complaint(build, "schedule", "cosin")


def test_a_misspelt_schedule_inside_an_objective_is_refused():
    given = {"name": "soflow", "schedule": "exponental"}
    assert "exponential" in complaint(build, "objective", given)


def test_the_exact_target_needs_a_flow():
    assert "flow" in complaint(build, "target", "exact")


def test_one_weight_instead_of_two_is_refused():
    given = {"name": "semigroup", "velocity_weight": [1.0]}
    assert "two positive numbers" in complaint(build, "objective", given)
