"Digits: the law of pictures, the reader and what fools it, the network, a short run that is saved and loaded, the exact map's copies, bad input."
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from soflow_edu.comparing import compare
from soflow_edu.config import load_config
from soflow_edu.core import InputError, build, describe, find
from soflow_edu.digits import ConvNet, Pictures, agreement, digit_reader, digits, mosaic, nearest, show_pictures, spread
from soflow_edu.distributions import FiniteSet, law_of
from soflow_edu.flow_matching import Batch
from soflow_edu.odes import ExactFlow, OdeFlow
from soflow_edu.sampling import sample
from soflow_edu.solution import SolutionModel
from soflow_edu.training import assemble, load_run, save_run, train, trained

law = digits()
noise = lambda n, seed=0, shape=(1, 8, 8): torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def coloured(n=40, seed=0, classes=4, size=8):
    "A small set of colour pictures."
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g) * 2 - 1
    return Pictures("colours", x[n // 4:], torch.arange(n - n // 4) % classes, x[:n // 4], torch.arange(n // 4) % classes, [f"kind {k}" for k in range(classes)])


# ------------------------------------------------------------------------------------------------ the law
def test_digits_are_those_of_sklearn_split_without_a_leak():
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert isinstance(law, FiniteSet) and law.points.shape == (1500, 1, 8, 8) and law.test.shape == (297, 1, 8, 8) and law.shape == (1, 8, 8)
    both = torch.cat([law.points, law.test])
    assert both.dtype == torch.float32 and both.min() == -1 and both.max() == 1 and torch.cat([law.labels, law.test_labels]).dtype == torch.int64
    rows = lambda pictures, labels: sorted(zip(map(tuple, np.asarray(pictures).reshape(-1, 64).tolist()), np.asarray(labels).tolist()))
    assert rows((both + 1) * 8, torch.cat([law.labels, law.test_labels])) == rows(raw.images, raw.target)
    shares = torch.stack([law.labels.bincount() / 1500, law.test_labels.bincount() / 297])
    assert (shares[0] - shares[1]).abs().max() < 0.003 and law.classes == 10 and law.names == tuple("0123456789") and law.features == "digits" and law.name == "digits"


def test_split_follows_its_seed():
    assert torch.equal(digits().points, law.points) and torch.equal(build("pictures", "digits").test, law.test)
    other = build("pictures", {"name": "digits", "seed": 1, "held_out": 100})
    assert other.test.shape == (100, 1, 8, 8) and len(other.points) == 1697 and not torch.equal(other.test, law.test[:100])


def test_sample_gives_pictures_with_their_labels():
    x, y = law.sample(500, torch.Generator().manual_seed(1))
    distance, which = nearest(x, law.points)
    assert (distance < 1e-5).all() and torch.equal(law.labels[which], y) and len(which.unique()) > 300
    assert torch.equal(x, law.sample(500, torch.Generator().manual_seed(1))[0])


# ------------------------------------------------------------------------------------------------ judging
def test_reader_reads_held_out_digits_and_is_fooled_by_means():
    assert agreement(law.test, law.test_labels) > 0.95 > 0.2 > agreement(noise(500), torch.arange(500) % 10)
    means = torch.stack([law.points[law.labels == k].mean(0) for k in range(10)])
    assert agreement(means, torch.arange(10)) == 1 and spread(means[torch.arange(100) % 10], torch.arange(100) % 10) < 1e-9
    assert 3 < spread(law.test, law.test_labels) < 3.6


def test_reader_is_the_classifier_of_sklearn():
    from sklearn.neural_network import MLPClassifier

    fitted = MLPClassifier((64,), alpha=1.0, learning_rate_init=5e-3, max_iter=500, random_state=3).fit(law.points.flatten(1).numpy(), law.labels.numpy())
    reader = digit_reader(3)
    torch.testing.assert_close(reader.logits(law.test).softmax(1), torch.tensor(fitted.predict_proba(law.test.flatten(1).numpy())).float(), atol=1e-4, rtol=0)
    assert reader(law.test).shape == (297, 64) and (reader(law.test) >= 0).all() and not any(p.requires_grad for p in reader.parameters())


def test_reader_is_made_anew_and_equal():
    first, second = build("features", "digits"), build("features", "digits")
    assert first is not second and torch.equal(first(law.test), second(law.test))
    first.hidden.weight.data.zero_()
    assert agreement(law.test, law.test_labels) > 0.95


def test_features_serve_the_metrics():
    from soflow_edu.metrics import extract, frechet

    z = [extract(x, law.features) for x in (law.points, law.test, -law.test)]
    assert z[0].shape == (1500, 64) and frechet(z[0], z[1]) < 0.1 * frechet(z[0], z[2])


def test_nearest_is_the_brute_force():
    a, b = noise(30, 1), noise(20, 2)
    all_pairs = (a[:, None] - b[None]).double().pow(2).flatten(2).sum(2).sqrt()
    assert torch.allclose(nearest(a, b)[0], all_pairs.min(1).values, atol=1e-6) and torch.equal(nearest(a, b)[1], all_pairs.argmin(1))


def test_spread_is_that_of_the_definition():
    x, y = noise(200, 3, (5,)) * 2 + torch.arange(200)[:, None] % 4 * 50, torch.arange(200) % 4
    by_hand = np.sqrt(np.mean([np.sum((x[i].numpy() - x[y == y[i]].numpy().mean(0))**2) for i in range(200)]))
    assert spread(x, y) == pytest.approx(by_hand, rel=1e-5)


# ------------------------------------------------------------------------------------------------ pictures on a page
@pytest.mark.parametrize("channels,shape", [(1, (14, 27)), (2, (14, 27)), (3, (14, 27, 3)), (4, (14, 27, 3))])
def test_mosaic_puts_pictures_where_they_belong(channels, shape):
    x = torch.rand(5, channels, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = mosaic(x, columns=4, gap=2)
    whole = whole if whole.ndim == 3 else whole[..., None]
    assert whole.shape == (14, 30, 3 if channels > 2 else 1)
    for i in range(5):
        row, column = 2 + i // 4 * 6, 2 + i % 4 * 7
        torch.testing.assert_close(whole[row:row + 4, column:column + 5].permute(2, 0, 1), (x[i, :whole.shape[2]] + 1) / 2)
    covered = whole.clone()
    for i in range(5): covered[2 + i // 4 * 6:6 + i // 4 * 6, 2 + i % 4 * 7:7 + i % 4 * 7] = 1
    assert (covered == 1).all()


def test_show_pictures_draws_words_and_no_axes():
    import matplotlib
    matplotlib.use("agg")
    figure = show_pictures(law.points[:6], titles=["a", "b", "c", "d", "e", "f"], rows=["first", "second"], columns=3)
    ax, = figure.axes
    assert [text.get_text().strip() for text in ax.texts] == ["a", "b", "c", "d", "e", "f", "first", "second"] and not ax.axison
    height, width = ax.images[0].get_array().shape
    assert all(text.get_position()[1] < height for text in ax.texts) and width == 3 * 9 + 1
    assert show_pictures(law.points[:3], ax=ax) is figure and show_pictures(coloured().points[:3]).axes[0].images[0].get_array().shape[2] == 3


# ------------------------------------------------------------------------------------------------ the network
def test_network_is_zero_at_first_and_uses_everything_it_is_told():
    net = ConvNet(size=16, channels=3, width=8, depth=2, patch=4, classes=5)
    x, t, y = noise(4, 1, (3, 16, 16)), torch.linspace(0.2, 0.9, 4), torch.tensor([0, 2, 4, 5])
    assert (net(x, t, t / 2, y) == 0).all() and net.spec() == describe(build("network", net.spec())) and net.classes == 5
    for part in net.parameters(): nn.init.normal_(part, std=0.3, generator=torch.Generator().manual_seed(part.numel()))
    out = net(x, t, t / 2, y)
    assert out.shape == x.shape
    for other in (net(-x, t, t / 2, y), net(x, t / 3, t / 2, y), net(x, t, t / 3, y), net(x, t, t / 2, (y + 1) % 6)): assert ((out - other).flatten(1).abs().max(1).values > 1e-4).all()
    assert torch.equal(net(x, t, t / 2), net(x, t, t / 2, torch.full((4,), 5)))
    torch.testing.assert_close(net(x[1:2], t[1:2], t[1:2] / 2, y[1:2]), out[1:2], atol=1e-5, rtol=1e-4)              # rows do not mix
    plain = ConvNet(width=8, depth=1)
    assert plain.classes == 0 and plain.labels is None and not SolutionModel(plain).conditional and plain(noise(2), t[:2], t[:2]).shape == (2, 1, 8, 8)


def test_every_weight_learns():
    torch.manual_seed(0)
    model, objective = assemble(load_config("digits"))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(6):
        batch = Batch(*law.sample(32, torch.Generator().manual_seed(step)))
        loss = objective.loss(model, batch, objective.draw(batch, 0.5, torch.Generator().manual_seed(step)), 0.5)
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(part.abs().max() > 0 for block in model.net.blocks for part in block.told.weight.grad.chunk(2))                      # scales and shifts


# ------------------------------------------------------------------------------------------------ the run
@pytest.fixture(scope="module")
def run():
    config = replace(load_config("digits"), steps=300, seconds=None)
    for step in train(*assemble(config), law_of(config.data), config): pass
    return step.run


def test_configuration_is_within_its_budget():
    config = load_config("digits")
    assert config.seconds <= 60 and config.data == "digits" and law_of(config.data).shape == (1, 8, 8) and config.objective["target"]["name"] == "guided"


def test_one_step_digits_are_read_as_asked_for_and_are_no_copies(run):
    model, y = trained(run), torch.arange(300) % 10
    x = sample(model, noise(300, 5), 1, y=y).clamp(-1, 1)
    assert agreement(x, y) > 0.9 and agreement(x, (y + 1) % 10) < 0.05 and spread(x, y) > 1.2
    assert nearest(x, law.points)[0].min() > 0.5 and nearest(x, law.test)[0].mean() < 3.2
    assert nearest(law.test, x)[0].mean() < nearest(law.test, torch.stack([law.points[law.labels == k].mean(0) for k in range(10)]))[0].mean() - 0.2


def test_run_is_saved_and_loaded(run, tmp_path):
    save_run(tmp_path, run)
    back = load_run(tmp_path)
    x, y = noise(20, 1), torch.arange(20) % 10
    assert torch.equal(sample(back.model, x, 1, y=y), sample(trained(run), x, 1, y=y)) and isinstance(back.model.net, ConvNet)
    assert isinstance(law_of(back.config.data), Pictures) and build("objective", back.objective).target.w == run.objective["target"]["w"]
    code = f"import torch; from soflow_edu.training import load_run; print(type(load_run({str(tmp_path)!r}).model.net).__name__)"          # by its name alone
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "ConvNet"


def test_compare_takes_both_truths(run):
    model, x, y = trained(run), noise(40, 2), torch.arange(40) % 10
    own = compare(model, OdeFlow(model, rtol=1e-3), x, y, metrics=("one_step", "properties")).values
    exact = compare(model, ExactFlow(law, model.path, 1.25), x, y, metrics=("one_step",)).values
    assert own["relative_rmse"] < exact["relative_rmse"] and own["semigroup_defect"] > 0


def test_exact_map_copies():
    x, y = noise(60, 3), torch.arange(60) % 10
    for w in (1.0, 1.5):
        ends = ExactFlow(law, build("path", "linear"), w).solution(x, 1.0, 0.0, y)
        distance, which = nearest(ends, law.points)
        assert (distance < 1e-2).all() and torch.equal(law.labels[which], y) and len(which.unique()) > 40


def test_three_colours_pass_through_the_same_verbs():
    colours = coloured()
    config = replace(load_config("digits"), network={"name": "conv", "channels": 3, "width": 8, "depth": 1, "patch": 2, "classes": 4}, steps=3, seconds=None, batch=16)
    for step in train(*assemble(config), colours, config): pass
    assert sample(trained(step.run), noise(4, 1, (3, 8, 8)), 2, y=torch.arange(4)).shape == (4, 3, 8, 8)


# ------------------------------------------------------------------------------------------------ bad input
x, y, tx, ty = law.points[:30], law.labels[:30], law.test[:20], law.test_labels[:20]
def made(points=x, labels=y, test=tx, test_labels=ty, names=range(10)): return Pictures("made", points, labels, test, test_labels, names)


def broken(value):
    z = x.clone()
    z[3, 0, 2, 2] = value
    return z


BAD = [
    (lambda: made(x.double()), "float32"),
    (lambda: made(x.numpy()), "ndarray"),
    (lambda: made((x * 127).to(torch.uint8)), "uint8"),
    (lambda: made(x[:, 0]), "(30, 8, 8)"),
    (lambda: made(x[:0], y[:0]), "N > 0"),
    (lambda: made(broken(torch.nan)), "NaN"),
    (lambda: made(broken(torch.inf)), "infinite"),
    (lambda: made(broken(1.01)), "1.01"),
    (lambda: made((x + 1) / 2), "2 * x - 1"),
    (lambda: made(test=(tx + 1) * 8), "held-out"),
    (lambda: made(test=tx[:, :, :7]), "must be equal"),
    (lambda: made(labels=y[:5]), "one for each picture"),
    (lambda: made(labels=y.float()), "int64"),
    (lambda: made(labels=y + 1), "0 to 9"),
    (lambda: made(labels=y - 1), "from -1"),
    (lambda: made(test_labels=ty + 1), "held-out"),
    (lambda: made(names=range(9)), "9 classes"),
    (lambda: digits(held_out=3), "ten classes"),
    (lambda: digits(held_out=1790), "1,787"),
    (lambda: build("pictures", {"name": "digits", "heldout": 3}), "held_out"),
    (lambda: mosaic(x[:, 0]), "(30, 8, 8)"),
    (lambda: mosaic(x, 0), "0 columns"),
    (lambda: mosaic([x]), "list"),
    (lambda: show_pictures(x[:2], titles="abc"), "3 titles"),
    (lambda: show_pictures(x[:2], rows="ab"), "2 words"),
    (lambda: show_pictures(x[:, 0]), "(30, 8, 8)"),
    (lambda: agreement(x, y[:3]), "(3,)"),
    (lambda: agreement(x, y.float()), "whole number"),
    (lambda: agreement(x[:0], y[:0]), "at least one"),
    (lambda: agreement(x, y + 5), "0 to 9"),
    (lambda: agreement(x, y, nn.Identity()), "no method logits"),
    (lambda: agreement(x, y, "digit"), "digits"),
    (lambda: agreement(x[:, :, :4], y), "(30, 1, 4, 8)"),
    (lambda: ConvNet(depth=0), "depth is 0"),
    (lambda: ConvNet(classes=-1), "classes is -1"),
    (lambda: ConvNet(size=9), "divides the size"),
    (lambda: build("network", {"name": "conv", "witdh": 3}), "width"),
    (lambda: ConvNet()(x, torch.ones(30), torch.ones(30), y), "no classes"),
    (lambda: ConvNet()(x[:, 0], torch.ones(30), torch.ones(30)), "(30, 8, 8)"),
    (lambda: ConvNet()(x[..., :7], torch.ones(30), torch.ones(30)), "(30, 1, 8, 7)"),
    (lambda: ConvNet(channels=3)(x, torch.ones(30), torch.ones(30)), "(B, 3, 8, 8)"),
    (lambda: ConvNet()(x, torch.ones(3), torch.ones(30)), "t has shape (3,)"),
    (lambda: ConvNet()(x, torch.ones(30), torch.ones(30, 1)), "d = t - s"),
    (lambda: ConvNet(classes=10)(x, torch.ones(30), torch.ones(30), y + 2), "10 for no label"),
    (lambda: ConvNet(classes=10)(x, torch.ones(30), torch.ones(30), y.float()), "30 integers"),
]


@pytest.mark.parametrize("call,words", BAD, ids=[f"{i:02d} {words}" for i, (_, words) in enumerate(BAD)])
def test_bad_input_is_refused_in_words(call, words):
    with pytest.raises(InputError) as error: call()
    assert words in str(error.value)


def test_components_are_found_by_name_alone():
    code = "import sys; from soflow_edu.config import find; found = [find('pictures', 'digits'), find('network', 'conv'), find('features', 'digits')]; print([m for m in ('sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]" and find("pictures", "digits") is digits
