"""The U-Net.

Equal to the public code, rebuilt from its description, exact in any layout, and clear
about what does not fit."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from soflow_edu.config import make_config
from soflow_edu.consistency import surrogate
from soflow_edu.core import InputError, build, describe, refusal
from soflow_edu.distributions import FiniteSet
from soflow_edu.flow_matching import Batch
from soflow_edu.soflow import Rows, SoFlow, difference_quotient, output_ahead
from soflow_edu.solution import SolutionModel
from soflow_edu.training import assemble, load_run, train, trained

PARITY = Path(__file__).parent / "parity"
TINY = {
    "name": "unet",
    "size": 16,
    "width": 16,
    "multipliers": [2, 2],
    "blocks": 1,
    "attention": [8],
    "dropout": 0.0,
    "augment": 6,
}
LAYOUTS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}
in_both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def awake(net, seed=0):
    "Every convolution at full size, so that every part matters."
    torch.manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
    return net.eval()


def inputs(net, B=4, seed=0):
    "Pictures, t and d that fit a network."
    o = net.options
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(B, generator=g)
    x = torch.randn(B, o["channels"], o["size"], o["size"], generator=g)
    return x, t, t * torch.rand(B, generator=g)


def relative(ours, theirs):
    ours = ours.detach().double()
    return ((ours - theirs.double()).norm() / theirs.double().norm()).item()


# ---------------------------------------------------------------- the public code
@pytest.fixture(scope="module")
def published():
    "The numbers of the public code, and our model with its weights."
    file = PARITY / "unet_linear_euler.safetensors"
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
    numbers = load_file(file)
    weights = {}
    for name, value in numbers.items():
        if name.startswith("weights/"):
            weights[name.removeprefix("weights/")] = value
    net = build("network", TINY)
    net.load_state_dict(weights)
    return numbers, meta, SolutionModel(net)


@in_both_layouts
def test_outputs_are_those_of_the_public_code(published, layout):
    d, _, model = published
    model = copy.deepcopy(model).to(memory_format=layout)
    x = d["x1"].to(memory_format=layout)
    extras = {"augment": d["augment_labels"]}
    with torch.no_grad():
        ours = {
            "F(x1,t,s)": model.F(x, d["t"], d["s"], **extras),
            "f(x1,t,s)": model(x, d["t"], d["s"], **extras),
            "velocity(x1,t)": model.velocity(x, d["t"], **extras),
            "f(x1,1,0)": model(x, 1.0, 0.0, **extras),
        }
    for name, value in ours.items():
        assert relative(value, d[name]) < 2e-6, name
    without_labels = model.F(x, d["t"], d["s"])
    assert relative(without_labels, d["F(x1,t,s)"]) > 1e-3  # the labels matter


def flow_matching_loss(d, meta, model):
    "Value, mean square error and mean weight, by the functions of chapter consistency."
    extras = {"augment": d["augment_labels"]}
    xt, v = model.path.interpolate(d["x0"], d["x1"], d["t"])
    rows = Rows(xt, v, d["t"], d["s"], d["l"], extras=extras)
    Ft = model.F(xt, d["t"], d["t"], **extras)
    objective = SoFlow(p=meta["p"], eps=meta["eps"])
    loss = objective.velocity_loss(model, rows, Ft)
    return loss.weighted.mean(), loss.error, loss.weighted / loss.error


def consistency_loss(d, meta, model):
    "Value, mean square error and mean weight, by the functions of chapter consistency."
    p = meta["p"]
    eps = meta["eps"]
    extras = {"augment": d["augment_labels"]}
    xt, v = model.path.interpolate(d["x0"], d["x1"], d["t"])
    rows = Rows(xt, v, d["t"], d["s"], d["l"], extras=extras)
    with torch.no_grad():
        Fl = output_ahead(model, rows, v)
    Ft = model.F(xt, d["t"], d["s"], **extras)
    q = difference_quotient(model, xt, d["t"], d["s"], d["l"], v, Ft, Fl)
    square = q.pow(2).flatten(1).mean(1)
    b = model.coefficients.b(d["t"], d["s"])
    return surrogate(Ft, q, b, p, eps), square, (square + eps) ** -p


LOSSES = {
    "fm": (flow_matching_loss, 1e-6, 5e-6),
    "scm": (consistency_loss, 2e-6, 1e-5),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_those_of_the_public_code(published, kind):
    d, meta, model = published
    loss, loss_limit, gradient_limit = LOSSES[kind]
    model.train()  # dropout is 0 in this file
    assert (d["t"] - d["l"]).min() > 1e-3  # below that the reference is less exact
    value, error, weight = loss(d, meta, model)
    model.zero_grad()
    value.backward()
    assert relative(value, d[f"{kind}/surrogate"]) < loss_limit
    assert relative(error.mean(), d[f"{kind}/mse"]) < loss_limit
    assert relative(weight.mean(), d[f"{kind}/weight"]) < loss_limit
    gradients = {name: p.grad for name, p in model.net.named_parameters()}
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    assert relative(norm, d[f"{kind}/grad_norm"]) < gradient_limit
    compared = [name for name in d if name.startswith(f"{kind}/grad/")]
    assert len(compared) >= 2
    for name in compared:
        ours = gradients[name.removeprefix(f"{kind}/grad/")]
        assert relative(ours, d[name]) < gradient_limit, name


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    shapes = json.loads((PARITY / "checkpoint_shapes.json").read_text())["UNet"]
    theirs = {name.removeprefix("network."): shape for name, shape in shapes.items()}
    with torch.device("meta"):
        state = build("network", "unet").state_dict()
    ours = {name: list(value.shape) for name, value in state.items()}
    assert ours == theirs and len(ours) == 425


# ---------------------------------------------------------------- the network
GAINS = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": 0.2**0.5}


def bound_of(name, weight):
    "The largest Xavier-uniform weight, with the gain of the published run."
    gain = next((g for end, g in GAINS.items() if name.endswith(end)), 1.0)
    receptive = weight[0, 0].numel()
    return gain * (6 / (receptive * (weight.shape[0] + weight.shape[1]))) ** 0.5


def test_initial_weights_are_xavier_uniform_with_the_published_gains():
    net = build("network", TINY | {"classes": 3})
    for name, part in net.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            bound = bound_of(name, part.weight)
            assert 0.97 * bound < part.weight.abs().max() <= bound * (1 + 1e-6), name
            assert part.bias is None or (part.bias == 0).all(), name
    assert net(*inputs(net)).abs().max() < 1e-3


def test_norms_and_dropout_are_set_as_published():
    net = build("network", TINY | {"classes": 3})
    norms = [part for part in net.modules() if isinstance(part, nn.GroupNorm)]
    for norm in norms:
        assert norm.eps == 1e-6
        assert norm.num_groups == min(32, norm.num_channels // 4)
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    for p in (0.0, 0.25):
        parts = build("network", TINY | {"dropout": p}).modules()
        assert {part.p for part in parts if isinstance(part, nn.Dropout)} == {p}


SHAPES = [
    {},
    {"patch": 2, "attention": []},
    {"channels": 1, "classes": 4, "augment": 0},
    {"multipliers": [3], "blocks": 2, "attention": [16], "width": 12},
    {"multipliers": [1, 2, 3], "attention": [16, 4], "blocks": 2},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_any_shape_is_rebuilt_from_its_description(options):
    net = awake(build("network", TINY | options))
    again = build("network", json.loads(json.dumps(describe(net)))).eval()
    again.load_state_dict(net.state_dict())
    x, t, d = inputs(net)
    y = torch.arange(4) if net.classes else None
    answer = net(x, t, d, y)
    assert answer.shape == x.shape and torch.equal(answer, again(x, t, d, y))
    assert not torch.allclose(answer, net(x, t * 0.9, d, y), rtol=1e-3)
    assert not torch.allclose(answer, net(x, t, d * 0.5, y), rtol=1e-3)


def test_patches_work_inside_only():
    "A network of half the size and four times the channels, between two shuffles."
    net = awake(build("network", TINY | {"patch": 2, "attention": []}))
    small = TINY | {"size": 8, "channels": 12, "attention": []}
    inner = build("network", small).eval()
    inner.load_state_dict(net.state_dict())
    x, t, d = inputs(net)
    answer = inner(nn.functional.pixel_unshuffle(x, 2), t, d)
    answer = nn.functional.pixel_shuffle(answer, 2)
    torch.testing.assert_close(net(x, t, d), answer)


def test_rows_do_not_mix():
    "Each picture is answered as if it were alone, with its own times and labels."
    net = awake(build("network", TINY | {"classes": 3}))
    y = torch.tensor([0, 1, 2, 3])
    augment = torch.randn(4, 6)
    rows = (*inputs(net), y, augment)
    together = net(*rows)
    for i in range(4):
        alone = net(*(part[i : i + 1] for part in rows))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_missing_labels_are_the_null_row_and_zeros():
    net = awake(build("network", TINY | {"classes": 3}))
    x, t, d = inputs(net)
    null = torch.full((4,), 3)
    assert net.map_label.weight.shape == (4, 64)
    assert net.map_augment.weight.shape == (64, 6)
    answer = net(x, t, d)
    assert torch.equal(answer, net(x, t, d, null, torch.zeros(4, 6)))
    assert not torch.allclose(answer, net(x, t, d, 0 * null), rtol=1e-3)
    distorted = net(x, t, d, augment=torch.ones(4, 6))
    assert not torch.allclose(answer, distorted, rtol=1e-3)


IMPOSSIBLE = [
    ({"size": 15}, "multiple of 2"),
    ({"size": 16, "patch": 3}, "multiple of 6"),
    ({"multipliers": []}, "at least 1"),
    ({"multipliers": [2, 0]}, "at least 1"),
    ({"width": 2}, "at least 4"),
    ({"blocks": 0}, "at least 1"),
    ({"attention": [12]}, "works at"),
    ({"attention": [16], "patch": 2}, "works at"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"widht": 8}, "width"),
    ({"classes": -1}, "classes is -1"),
    ({"channels": 0}, "at least 1"),
    ({"augment": -6}, "at least 0"),
]


@pytest.mark.parametrize("options, words", IMPOSSIBLE, ids=str)
def test_networks_that_cannot_be_built_are_refused(options, words):
    assert words in refusal(build, "network", TINY | options)


def test_inputs_that_do_not_fit_are_refused():
    net = build("network", TINY | {"classes": 3})
    x, t, d = inputs(net)
    y = torch.tensor([0, 1, 2, 3])
    augment = torch.zeros(4, 6)
    wrong = {
        "pictures of shape": (x[..., :8], t, d),
        "(B, 3, 16, 16)": (x[:, :1], t, d),
        "This network takes": (x[0], t, d),
        "t has shape": (x, t[:2], d),
        "d = t - s has": (x, t, d[0]),
        "classes 0 to 2, and 3": (x, t, d, y + 1),
        "run from -1": (x, t, d, y - 1),
        "but 4 integers": (x, t, d, y[:2]),
        "torch.float32": (x, t, d, y.float()),
        "(4, 6) was expected": (x, t, d, y, augment[:, :5]),
        "shape (2, 6)": (x, t, d, y, augment[:2]),
    }
    for words, given in wrong.items():
        assert words in refusal(net, *given)


def test_labels_are_refused_by_a_network_that_has_none():
    plain = build("network", TINY | {"augment": 0})
    x, t, d = inputs(plain)
    assert "no classes" in refusal(plain, x, t, d, torch.tensor([0, 1, 2, 3]))
    assert "has none" in refusal(plain, x, t, d, augment=torch.zeros(4, 6))


# ---------------------------------------------------------------- layout, precision
def test_channels_last_gives_the_same_gradients():
    net = awake(build("network", TINY))
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x, t, d = inputs(net)
    seen = []

    def note_layout(_, args, out):
        seen.append(out.is_contiguous(memory_format=torch.channels_last))

    last.dec["16x16_block1"].register_forward_hook(note_layout)
    net(x, t, d).pow(2).mean().backward()
    last(x.to(memory_format=torch.channels_last), t, d).pow(2).mean().backward()
    assert seen == [True]  # kept to the end, through attention and the stack
    for (name, a), b in zip(net.named_parameters(), last.parameters(), strict=True):
        if a.grad is not None:
            atol = 1e-5 * a.grad.abs().max().item() + 1e-7
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=atol, msg=name)


def test_bfloat16_keeps_the_times_and_the_last_layer_exact():
    net = awake(build("network", TINY))
    x, t, d = inputs(net)
    dtypes = {}

    def note_dtype(name, _, args, out):
        dtypes[name] = out.dtype

    parts = {
        "block": net.enc["8x8_block0"].conv0,
        "last": net.dec["16x16_aux_conv"],
        "times": net.map_layer1,
    }
    for name, part in parts.items():
        part.register_forward_hook(partial(note_dtype, name))
    with torch.autocast("cpu", torch.bfloat16):
        answer = net(x, t, d)
        answer.pow(2).mean().backward()
    exact = torch.float32
    assert dtypes == {"block": torch.bfloat16, "last": exact, "times": exact}
    assert answer.dtype == exact
    assert relative(answer, net(x, t, d)) < 0.03
    for name, p in net.named_parameters():
        if "augment" not in name:
            assert p.grad.dtype == exact and p.grad.isfinite().all(), name
    double = copy.deepcopy(net).double()
    assert relative(double(x.double(), t.double(), d.double()), answer) < 0.03


def test_compiled_network_gives_the_same_answer_and_gradients():
    small = {"size": 8, "width": 8, "attention": [4], "classes": 3, "patch": 1}
    net = awake(build("network", TINY | small))
    x, t, d = inputs(net)
    y = torch.tensor([0, 1, 2, 3])
    augment = torch.randn(4, 6)
    # Traces forward and backward as inductor does, without minutes of C++.
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = []
    for run in (net, compiled):
        net.zero_grad()
        answer = run(x, t, d, y, augment)
        answer.pow(2).mean().backward()
        found.append([answer.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- in the loop
@in_both_layouts
def test_the_random_state_put_back_drops_the_same(layout):
    "With and without gradients, so that both calls of the loss can have one mask."
    net = awake(build("network", TINY | {"dropout": 0.3}))
    net = net.to(memory_format=layout).train()
    x, t, d = inputs(net)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        ahead = net(x, t, d)
    assert torch.equal(net(x, t, d), ahead)
    assert not torch.allclose(net(x, t, d), ahead, rtol=1e-2)
    assert torch.equal(net.eval()(x, t, d), net(x, t, d))


GUIDED = {"name": "guided", "w": 2.0, "m": 0.5}
OBJECTIVES = {
    "flow_matching": "flow_matching",
    "soflow": "soflow",
    "guided": {"name": "soflow", "lam": 0.5, "target": GUIDED},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_trains_and_is_saved_like_any_network(tmp_path, objective):
    levels = torch.tensor([-1.0, 0.5, 2.0])[:, None, None, None]
    stripes = torch.ones(8, 8).tril()[None, None] * levels
    data = FiniteSet(stripes, torch.arange(3))
    network = {
        "name": "unet",
        "size": 8,
        "channels": 1,
        "width": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": [4],
        "dropout": 0.1,
        "augment": 0,
        "classes": 3,
    }
    settings = {
        "steps": 40,
        "batch": 24,
        "network": network,
        "objective": objective,
        "learning_rate": 1e-2,
        "warmup": 1,
    }
    config = make_config(settings)
    steps = list(train(*assemble(config), data, config, out=tmp_path / "run"))
    errors = [step.stats["velocity_mse"] for step in steps]
    assert sum(errors[-5:]) < 0.9 * sum(errors[:5])
    run = load_run(tmp_path / "run")
    x1 = torch.randn(3, 1, 8, 8)
    y = torch.arange(3)
    kept = trained(steps[-1].run)
    assert torch.equal(run.model(x1, 1.0, 0.0, y), kept(x1, 1.0, 0.0, y))


@pytest.mark.parametrize("name", ["flow_matching", "soflow"])
def test_augmentation_labels_reach_the_network_by_name(name):
    model = SolutionModel(awake(build("network", TINY)))
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 3, 16, 16, generator=g)
    labels = torch.randn(6, 6, generator=g)
    objective = build("objective", name)
    draws = objective.draw(Batch(x0), 0.5, g)

    def loss(extras):
        return objective.loss(model, Batch(x0, extras=extras), draws, 0.5).value

    without = loss({})
    assert abs(loss({"augment": labels}) - without) > 1e-4 * abs(without)
    with pytest.raises(InputError, match="Augmentation labels have shape"):
        loss({"augment": labels[:, :5]})
