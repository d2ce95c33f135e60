"The two losses of SoFlow: whatever path, inputs and labels, and at short jumps."

from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

from helpers import GUIDED, SamplesOnly, complaint, train_to_end
from soflow_edu.cifar10 import load_weights
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


# ------------------------------------------------------------------------ fewer bits
def at_share(r: float, **options) -> dict:
    "SoFlow's description at a constant share r, whose rows all train the map."
    schedule = {"name": "constant", "r_end": r}
    weights = {"p": 0.75, "eps": 1e-3}
    return {"name": "soflow", "lam": 0.0, "schedule": schedule} | weights | options


def first_batch(description: dict, x0: torch.Tensor, progress: float = 0.5) -> tuple:
    "An objective with a batch, its draws and a moment: what `loss` is given."
    objective = build("objective", description)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(x0)
    draws = objective.draw(batch, progress, generator)
    return objective, batch, draws, progress


@contextmanager
def in_autocast(model: SolutionModel):
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def by_its_own_word(model: SolutionModel):
    model.precision = "bfloat16"
    yield


WAYS = (in_autocast, by_its_own_word)


def plainly(model: SolutionModel):
    return nullcontext()


@cache
def trained_model() -> SolutionModel:
    "The kept map of CIFAR-10, to be trained further."
    return load_weights("cifar10-soflow").requires_grad_(True)


@cache
def drawn_pictures() -> torch.Tensor:  # (16, 3, 32, 32)
    "Pictures that this map makes of noise."
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return trained_model()(noise, 1.0, 0.0)


def gradient(description: dict, way=plainly) -> torch.Tensor:  # (number of weights,)
    "The gradient of a loss, with a network in the precision that is named."
    model = copy(trained_model())
    objective, *given = first_batch(description, drawn_pictures())
    with way(model):
        value = objective.loss(model, *given).value
    parts = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def lost(description: dict, way) -> float:
    "What bfloat16 does to the gradient, in units of its length."
    exact = gradient(description)
    return ((gradient(description, way) - exact).norm() / exact.norm()).item()


LOST = [(1, in_autocast, 0.3), (2, by_its_own_word, 0.15)]


@pytest.mark.parametrize("jumps, way, least", LOST)
def test_values_in_float32_save_the_gradient_of_small_steps(jumps, way, least):
    assert lost(at_share(0.002, jumps=jumps, float32_below=0.0), way) > least
    assert lost(at_share(0.002, jumps=jumps), way) < 0.05


def test_the_semigroup_form_needs_no_digits():
    assert lost({"name": "semigroup", "lam": 0.25}, in_autocast) < 0.05


class Counting(nn.Module):
    "A small network with dropout that keeps the masks, and how often it was called."

    classes = 0

    def __init__(self, p: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(4, 64)
        self.outlet = nn.Linear(64, 2)
        self.dropout = nn.Dropout(p)
        self.masks = []
        self.inner = []

    def forward(self, x, t, d, y=None):
        h = torch.relu(self.inlet(torch.cat([x, t[:, None], d[:, None]], 1)))
        self.inner.append(h.dtype)
        kept = self.dropout(torch.ones_like(h))
        self.masks.append(kept > 0)
        return self.outlet(h * kept)


def called(description: dict, way=plainly, p: float = 0.0, progress: float = 0.5):
    "The loss of a counting network, the network, and the next random number."
    model = SolutionModel(Counting(p))
    objective, *given = first_batch(description, TWO_DIMENSIONS, progress)
    torch.manual_seed(1)
    with way(model):
        loss = objective.loss(model, *given)
    return loss.value, model.net, torch.rand(())


TWO_DIMENSIONS = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
NEVER = {"float32_below": 0.0}
WITHOUT_EFFECT = {
    "no autocast": (at_share(0.002), plainly),
    "a large share": (at_share(0.1), in_autocast),
    "the semigroup form": ({"name": "semigroup"}, in_autocast),
    "no rows for the map": (at_share(0.002, lam=1.0), in_autocast),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_where_no_digits_are_needed_none_are_paid_for(case):
    """The loss is equal in every bit, the network is called as often, and the random
    numbers go on as before."""
    description, way = WITHOUT_EFFECT[case]
    plain, net, number = called(description | NEVER, way, p=0.2)
    ours, again, same_number = called(description, way, p=0.2)
    assert torch.equal(ours, plain) and number == same_number
    assert again.inner == net.inner


def test_one_more_evaluation_and_two_of_them_in_float32():
    plain, net, number = called(at_share(0.002) | NEVER, in_autocast)
    ours, again, same_number = called(at_share(0.002), in_autocast)
    single = torch.float32
    short = torch.bfloat16
    assert net.inner == [short, short]
    assert again.inner == [single, single, short]
    assert number == same_number and not torch.equal(ours, plain)


def test_the_value_is_that_of_float32_to_the_bit():
    for jumps in (1, 2):
        description = at_share(0.002, jumps=jumps)
        value, *_ = called(description, in_autocast)
        assert torch.equal(value, called(description)[0])


def test_the_share_of_consistency_training_is_that_of_its_grid():
    description = {"name": "consistency"}
    _, early, _ = called(description, in_autocast, progress=0.0)  # 1 / 8
    _, late, _ = called(description, in_autocast, progress=0.9)  # 1 / 128
    assert len(early.inner) == 2 and len(late.inner) == 3


@pytest.mark.parametrize("way", WAYS)
def test_the_masks_are_the_same_in_all_calls(way):
    *_, net, _ = called(at_share(0.002), way, p=0.4)
    ahead, values, with_gradient = net.masks
    assert torch.equal(ahead, values) and torch.equal(ahead, with_gradient)
    assert 0.5 < ahead.float().mean() < 0.7
    *_, net, _ = called(at_share(0.002, lam=0.25), way, p=0.4)
    ahead, values, with_gradient, still = net.masks
    assert torch.equal(ahead, values) and torch.equal(ahead, with_gradient)
    assert len(still) == 64


class Failing(nn.Module):
    classes = 0

    def forward(self, x, t, d, y=None):
        assert not torch.backends.cudnn.allow_tf32
        raise ArithmeticError("no answer")


def test_what_torch_may_round_is_put_back_also_after_a_failure():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with in_autocast(None), pytest.raises(ArithmeticError):
            objective, *given = first_batch(at_share(0.002), TWO_DIMENSIONS)
            objective.loss(SolutionModel(Failing()), *given)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


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


def test_a_share_above_one_is_refused():
    given = at_share(0.002, float32_below=2.0)
    assert "float32_below is 2.0" in complaint(build, "objective", given)
