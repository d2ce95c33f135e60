"The U-Net: equal to the public code, rebuilt from its description, exact in any layout, and clear about what does not fit."
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from soflow_edu import unet
from soflow_edu.config import make_config
from soflow_edu.core import InputError, build, describe
from soflow_edu.consistency import surrogate
from soflow_edu.soflow import Rows, SoFlow, difference_quotient, output_ahead
from soflow_edu.distributions import FiniteSet
from soflow_edu.flow_matching import Batch
from soflow_edu.solution import SolutionModel
from soflow_edu.training import assemble, load_run, train, trained
from soflow_edu.unet import Conv

PARITY = Path(__file__).parent / "parity"
TINY = {"name": "unet", "size": 16, "width": 16, "multipliers": [2, 2], "blocks": 1, "attention": [8], "dropout": 0.0, "augment": 6}


def awake(net, seed=0):
    "Every convolution at full size, so that every part matters."
    torch.manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
    return net.eval()


def inputs(net, B=4, seed=0):
    o, g = net.options, torch.Generator().manual_seed(seed)
    t = torch.rand(B, generator=g)
    return torch.randn(B, o["channels"], o["size"], o["size"], generator=g), t, t * torch.rand(B, generator=g)


# ---------------------------------------------------------------------------------------------------- the public code
@pytest.fixture(scope="module")
def published():
    "The numbers of the public code, and our model with its weights."
    file = PARITY / "unet_linear_euler.safetensors"
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
    numbers = load_file(file)
    net = build("network", TINY)
    net.load_state_dict({name.removeprefix("weights/"): value for name, value in numbers.items() if name.startswith("weights/")})
    return numbers, meta, SolutionModel(net)


def relative(ours, theirs):
    return ((ours.detach().double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels_last"])
def test_outputs_are_those_of_the_public_code(published, layout):
    d, _, model = published
    model, x, extras = copy.deepcopy(model).to(memory_format=layout), d["x1"].to(memory_format=layout), {"augment": d["augment_labels"]}
    with torch.no_grad():
        ours = {"F(x1,t,s)": model.F(x, d["t"], d["s"], **extras), "f(x1,t,s)": model(x, d["t"], d["s"], **extras),
                "velocity(x1,t)": model.velocity(x, d["t"], **extras), "f(x1,1,0)": model(x, 1.0, 0.0, **extras)}
    for name, value in ours.items():
        assert relative(value, d[name]) < 2e-6, name
    assert relative(model.F(x, d["t"], d["s"]), d["F(x1,t,s)"]) > 1e-3      # the labels matter


def losses(d, meta, model):
    "Both losses from the functions of chapter consistency: value, mean square error, mean weight."
    p, eps, extras = meta["p"], meta["eps"], {"augment": d["augment_labels"]}
    xt, v = model.path.interpolate(d["x0"], d["x1"], d["t"])
    rows = Rows(xt, v, d["t"], d["s"], d["l"], extras=extras)
    loss = SoFlow(p=p, eps=eps).velocity_loss(model, rows, model.F(xt, d["t"], d["t"], **extras))
    weighted, error = loss.weighted, loss.error
    yield "fm", weighted.mean(), error, (weighted / error)
    with torch.no_grad():
        Fl = output_ahead(model, rows, v)
    Ft = model.F(xt, d["t"], d["s"], **extras)
    q = difference_quotient(model, xt, d["t"], d["s"], d["l"], v, Ft, Fl)
    square = q.pow(2).flatten(1).mean(1)
    yield "scm", surrogate(Ft, q, model.coefficients.b(d["t"], d["s"]), p, eps), square, (square + eps)**-p


LIMITS = {"fm": {"loss": 1e-6, "gradient": 5e-6}, "scm": {"loss": 2e-5, "gradient": 1e-5}}


def test_losses_and_gradients_are_those_of_the_public_code(published):
    d, meta, model = published
    model.train()                                  # dropout is 0 in this file
    assert (d["t"] - d["l"]).min() > 1e-3          # below that the reference itself is less exact
    for kind, value, error, weight in losses(d, meta, model):
        model.zero_grad()
        value.backward()
        gradients = {name: p.grad for name, p in model.net.named_parameters()}
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        assert max(relative(value, d[f"{kind}/surrogate"]), relative(error.mean(), d[f"{kind}/mse"]), relative(weight.mean(), d[f"{kind}/weight"])) < LIMITS[kind]["loss"]
        compared = [name.removeprefix(f"{kind}/grad/") for name in d if name.startswith(f"{kind}/grad/")]
        assert len(compared) >= 2
        assert max([relative(norm, d[f"{kind}/grad_norm"]), *(relative(gradients[name], d[f"{kind}/grad/{name}"]) for name in compared)]) < LIMITS[kind]["gradient"]


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    theirs = {name.removeprefix("network."): shape for name, shape in json.loads((PARITY / "checkpoint_shapes.json").read_text())["UNet"].items()}
    with torch.device("meta"):
        ours = {name: list(value.shape) for name, value in build("network", "unet").state_dict().items()}
    assert ours == theirs and len(ours) == 425


# ---------------------------------------------------------------------------------------------------- the network
def test_initial_weights():
    "Xavier-uniform, zero biases, and the gains of the published run."
    net = build("network", TINY | {"classes": 3})
    gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": 0.2**0.5}
    for name, part in net.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
            receptive = part.weight[0, 0].numel()
            bound = gain * (6 / (receptive * (part.weight.shape[0] + part.weight.shape[1])))**0.5
            assert 0.97 * bound < part.weight.abs().max() <= bound * (1 + 1e-6), name
            assert part.bias is None or (part.bias == 0).all(), name
        if isinstance(part, nn.GroupNorm):
            assert (part.eps, part.num_groups) == (1e-6, min(32, part.num_channels // 4)) and (part.weight == 1).all() and (part.bias == 0).all()
        if isinstance(part, nn.Dropout):
            assert part.p == 0.0
    assert net(*inputs(net)).abs().max() < 1e-3
    assert {part.p for part in build("network", TINY | {"dropout": 0.25}).modules() if isinstance(part, nn.Dropout)} == {0.25}


@pytest.mark.parametrize("options", [{}, {"patch": 2, "attention": []}, {"channels": 1, "classes": 4, "augment": 0}, {"multipliers": [3], "blocks": 2, "attention": [16], "width": 12},
                                     {"multipliers": [1, 2, 3], "attention": [16, 4], "blocks": 2}], ids=str)
def test_any_shape_is_rebuilt_from_its_description(options):
    net = awake(build("network", TINY | options))
    again = build("network", json.loads(json.dumps(describe(net)))).eval()
    again.load_state_dict(net.state_dict())
    x, t, d = inputs(net)
    y = torch.arange(4) if net.classes else None
    answer = net(x, t, d, y)
    assert answer.shape == x.shape and torch.equal(answer, again(x, t, d, y))
    assert all(not torch.allclose(answer, net(x, *other, y), rtol=1e-3) for other in ((t * 0.9, d), (t, d * 0.5)))


def test_patches_work_inside_only():
    "With patches the network is one of half the size and four times the channels, between two shuffles."
    net, inner = awake(build("network", TINY | {"patch": 2, "attention": []})), build("network", TINY | {"size": 8, "channels": 12, "attention": []}).eval()
    inner.load_state_dict(net.state_dict())
    x, t, d = inputs(net)
    torch.testing.assert_close(net(x, t, d), nn.functional.pixel_shuffle(inner(nn.functional.pixel_unshuffle(x, 2), t, d), 2))


def test_rows_do_not_mix():
    "Each picture is answered as if it were alone, with its own times and labels."
    net = awake(build("network", TINY | {"classes": 3}))
    (x, t, d), y, augment = inputs(net), torch.tensor([0, 1, 2, 3]), torch.randn(4, 6)
    together = net(x, t, d, y, augment)
    for i in range(4):
        torch.testing.assert_close(net(x[i:i + 1], t[i:i + 1], d[i:i + 1], y[i:i + 1], augment[i:i + 1]), together[i:i + 1], rtol=1e-4, atol=1e-4)


def test_missing_labels_are_the_null_row_and_zeros():
    net = awake(build("network", TINY | {"classes": 3}))
    (x, t, d), null = inputs(net), torch.full((4,), 3)
    assert net.map_label.weight.shape == (4, 64) and net.map_augment.weight.shape == (64, 6)
    assert torch.equal(net(x, t, d), net(x, t, d, null, torch.zeros(4, 6)))
    assert not torch.allclose(net(x, t, d), net(x, t, d, 0 * null), rtol=1e-3)
    assert not torch.allclose(net(x, t, d), net(x, t, d, augment=torch.ones(4, 6)), rtol=1e-3)


@pytest.mark.parametrize("options, words", [
    ({"size": 15}, "multiple of 2"), ({"size": 16, "patch": 3}, "multiple of 6"), ({"multipliers": []}, "at least 1"), ({"multipliers": [2, 0]}, "at least 1"), ({"width": 2}, "at least 4"),
    ({"blocks": 0}, "at least 1"), ({"attention": [12]}, "works at"), ({"attention": [16], "patch": 2}, "works at"), ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "dropout"), ({"widht": 8}, "width"),
    ({"classes": -1}, "classes is -1"), ({"channels": 0}, "at least 1"), ({"augment": -6}, "at least 0")], ids=str)
def test_networks_that_cannot_be_built_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        build("network", TINY | options)


def test_inputs_that_do_not_fit_are_refused():
    plain, net = build("network", TINY | {"augment": 0}), build("network", TINY | {"classes": 3})
    x, t, d = inputs(net)
    y, augment = torch.tensor([0, 1, 2, 3]), torch.zeros(4, 6)
    for words, call in {"pictures of shape": lambda: net(x[..., :8], t, d), r"\(B, 3, 16, 16\)": lambda: net(x[:, :1], t, d), "t has shape": lambda: net(x, t[:2], d), "d = t - s has": lambda: net(x, t, d[0]),
                        "classes 0 to 2, and 3": lambda: net(x, t, d, y + 1), "run from -1": lambda: net(x, t, d, y - 1), "no classes": lambda: plain(x, t, d, y), "but 4 integers": lambda: net(x, t, d, y[:2]),
                        "torch.float32": lambda: net(x, t, d, y.float()), r"\(4, 6\) was expected": lambda: net(x, t, d, y, augment[:, :5]), r"shape \(2, 6\)": lambda: net(x, t, d, y, augment[:2]),
                        "has none": lambda: plain(x, t, d, augment=augment), "This network takes": lambda: net(x[0], t, d)}.items():
        with pytest.raises(InputError, match=words):
            call()


# ---------------------------------------------------------------------------------------------------- layout, precision, compilation
def test_channels_last_gives_the_same_gradients():
    net = awake(build("network", TINY))
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x, t, d = inputs(net)
    seen = []
    last.dec["16x16_block1"].register_forward_hook(lambda _, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
    net(x, t, d).pow(2).mean().backward()
    last(x.to(memory_format=torch.channels_last), t, d).pow(2).mean().backward()
    assert seen == [True]                                       # the layout is kept to the end, through attention and the stack
    for (name, a), b in zip(net.named_parameters(), last.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 * a.grad.abs().max().item() + 1e-7, msg=name)


def test_bfloat16_keeps_the_times_and_the_last_layer_exact():
    net = awake(build("network", TINY))
    x, t, d = inputs(net)
    dtypes = {}
    for name, part in {"block": net.enc["8x8_block0"].conv0, "last": net.dec["16x16_aux_conv"], "times": net.map_layer1}.items():
        part.register_forward_hook(lambda _, args, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        answer = net(x, t, d)
        answer.pow(2).mean().backward()
    assert dtypes == {"block": torch.bfloat16, "last": torch.float32, "times": torch.float32} and answer.dtype == torch.float32
    assert relative(answer, net(x, t, d)) < 0.03
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for name, p in net.named_parameters() if "augment" not in name)
    assert relative(copy.deepcopy(net).double()(x.double(), t.double(), d.double()), answer) < 0.03


def test_compiled_network_gives_the_same_answer_and_gradients():
    net = awake(build("network", TINY | {"size": 8, "width": 8, "attention": [4], "classes": 3, "patch": 1}))
    (x, t, d), y, augment = inputs(net), torch.tensor([0, 1, 2, 3]), torch.randn(4, 6)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")      # traces forward and backward as inductor does, without minutes of C++
    gradients = []
    for run in (net, compiled):
        net.zero_grad()
        answer = run(x, t, d, y, augment)
        answer.pow(2).mean().backward()
        gradients.append([answer.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- fewer multiplications
WIDE = TINY | {"width": 128, "multipliers": [1], "blocks": 1, "attention": []}


@pytest.fixture
def counted(monkeypatch):
    "How often `pays` said yes."
    yes, pays = [], unet.pays
    monkeypatch.setattr(unet, "pays", lambda x, weight: pays(x, weight) and not yes.append(x.shape))
    return yes


def answers_of(net, x, t, d):
    net.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(x, t, d)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_winograd_gives_the_answers_and_gradients_of_the_library(counted, monkeypatch):
    net = awake(build("network", WIDE)).to(memory_format=torch.channels_last)
    x, t, d = inputs(net)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(): first = net(x, t, d)                 # scratch memory made here must serve a training, too
    ours, taken = answers_of(net, x, t, d), len(counted)
    assert taken == 20 and torch.equal(first, ours[0])
    monkeypatch.setattr(unet, "pays", lambda x, weight: False)
    library = answers_of(net, x, t, d)
    assert len(counted) == taken and not torch.equal(ours[0], library[0]) and max(relative(a, b) for a, b in zip(ours, library)) < 3e-5


@pytest.mark.parametrize("shape", [(1, 128, 32, 32), (9, 160, 16, 30), (3, 128, 24, 16)])       # more and less than the pixels of one part
def test_winograd_in_parts(shape):
    x, w = torch.randn(shape).permute(0, 2, 3, 1).contiguous().requires_grad_(), torch.randn(130, shape[1], 3, 3, requires_grad=True)
    slope = torch.randn(*x.shape[:3], 130)
    library = functional.conv2d(x.double().permute(0, 3, 1, 2), w.double(), padding=1).permute(0, 2, 3, 1)
    ours = unet.winograd(x, w)
    assert relative(ours, library) < 2e-6
    for a, b in zip(torch.autograd.grad(ours, (x, w), slope), torch.autograd.grad(library, (x, w), slope.double())): assert relative(a, b) < 2e-6


def test_where_winograd_cannot_be_taken_the_library_is(counted):
    conv = Conv(128, 128).to(memory_format=torch.channels_last)
    x = torch.randn(4, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    conv(x)
    assert len(counted) == 1
    value, slope = torch.func.jvp(conv, (x,), (x,))                    # linear but for its bias
    torch.testing.assert_close(slope, value - conv.bias[:, None, None])
    with torch.autocast("cpu", torch.bfloat16): assert conv(x).dtype == torch.bfloat16
    conv(x.contiguous()), conv(x[:, :, :8, :8].contiguous(memory_format=torch.channels_last)), copy.deepcopy(conv).double()(x.double())
    assert len(counted) == 1


def test_winograd_in_a_compiled_network(counted):
    conv = Conv(128, 128).to(memory_format=torch.channels_last)
    x = torch.randn(4, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    given, library = torch.compile(conv, backend="aot_eager", fullgraph=True)(x), functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(given, library, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(y.square().sum(), conv.weight)[0] for y in (given, library)]
    assert relative(*grads) < 1e-5 and not torch.equal(*grads)


# ---------------------------------------------------------------------------------------------------- in the loop
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels_last"])
def test_the_random_state_put_back_drops_the_same(layout):
    "With and without gradients, so that both calls of the consistency loss can have one mask."
    net = awake(build("network", TINY | {"dropout": 0.3})).to(memory_format=layout).train()
    x, t, d = inputs(net)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        ahead = net(x, t, d)
    assert torch.equal(net(x, t, d), ahead)
    assert not torch.allclose(net(x, t, d), ahead, rtol=1e-2) and torch.equal(net.eval()(x, t, d), net(x, t, d))


@pytest.mark.parametrize("objective", ["flow_matching", "soflow", {"name": "soflow", "lam": 0.5, "target": {"name": "guided", "w": 2.0, "m": 0.5}}], ids=["flow_matching", "soflow", "guided"])
def test_trains_and_is_saved_like_any_network(tmp_path, objective):
    stripes = torch.ones(8, 8).tril()[None, None] * torch.tensor([-1.0, 0.5, 2.0])[:, None, None, None]
    data = FiniteSet(stripes, torch.arange(3))
    network = {"name": "unet", "size": 8, "channels": 1, "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.1, "augment": 0, "classes": 3}
    config = make_config({"steps": 40, "batch": 24, "network": network, "objective": objective, "learning_rate": 1e-2, "warmup": 1})
    steps = list(train(*assemble(config), data, config, out=tmp_path / "run"))
    errors = [step.stats["velocity_mse"] for step in steps]
    assert sum(errors[-5:]) < 0.9 * sum(errors[:5])
    run = load_run(tmp_path / "run")
    x1, y = torch.randn(3, 1, 8, 8), torch.arange(3)
    assert torch.equal(run.model(x1, 1.0, 0.0, y), trained(steps[-1].run)(x1, 1.0, 0.0, y))


def test_augmentation_labels_reach_the_network_by_name():
    model, g = SolutionModel(awake(build("network", TINY))), torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(6, 3, 16, 16, generator=g), extras={"augment": torch.randn(6, 6, generator=g)})
    for name in ("flow_matching", "soflow"):
        objective = build("objective", name)
        draws = objective.draw(batch, 0.5, g)
        with_labels, without = (objective.loss(model, Batch(batch.x0, extras=extras), draws, 0.5).value for extras in (batch.extras, {}))
        assert abs(with_labels - without) > 1e-4 * abs(without)
    with pytest.raises(InputError, match="Augmentation labels have shape"):
        objective.loss(model, Batch(batch.x0, extras={"augment": batch.extras["augment"][:, :5]}), draws, 0.5)
