"""Digits: the law of pictures, the reader and what fools it, the network, the run.

A short run is saved and loaded; the exact map copies; bad input is refused."""

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
from soflow_edu.digits import (
    ConvNet,
    Pictures,
    agreement,
    digit_reader,
    digits,
    mosaic,
    nearest,
    show_pictures,
    spread,
)
from soflow_edu.distributions import FiniteSet, law_of
from soflow_edu.flow_matching import Batch
from soflow_edu.odes import ExactFlow, OdeFlow
from soflow_edu.sampling import sample
from soflow_edu.solution import SolutionModel
from soflow_edu.training import assemble, load_run, save_run, train, trained

law = digits()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(n, seed=0, shape=(1, 8, 8)):
    return torch.randn(n, *shape, generator=seeded(seed))


def class_means():
    return torch.stack([law.points[law.labels == k].mean(0) for k in range(10)])


def randomise(net, std):
    "Gives every tensor of a network random values that follow from its size."
    for part in net.parameters():
        nn.init.normal_(part, std=std, generator=seeded(part.numel()))


def coloured(n=40, seed=0, classes=4, size=8):
    "A small set of colour pictures, of which a quarter is held out."
    x = torch.rand(n, 3, size, size, generator=seeded(seed)) * 2 - 1
    held = n // 4
    labels = torch.arange(n - held) % classes
    test_labels = torch.arange(held) % classes
    names = [f"kind {k}" for k in range(classes)]
    return Pictures("colours", x[held:], labels, x[:held], test_labels, names)


def printed_by(code):
    "What a fresh Python prints."
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --------------------------------------------------------------------------- the law
def as_rows(pictures, labels):
    "Pictures with their labels, sorted, as numbers that can be compared."
    flat = np.asarray(pictures).reshape(-1, 64).tolist()
    pairs = zip(map(tuple, flat), np.asarray(labels).tolist(), strict=True)
    return sorted(pairs)


def test_digits_are_those_of_sklearn_split_without_a_leak():
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert isinstance(law, FiniteSet)
    assert law.points.shape == (1500, 1, 8, 8)
    assert law.test.shape == (297, 1, 8, 8)
    both = torch.cat([law.points, law.test])
    labels = torch.cat([law.labels, law.test_labels])
    assert both.dtype == torch.float32
    assert both.min() == -1 and both.max() == 1
    assert labels.dtype == torch.int64
    assert as_rows((both + 1) * 8, labels) == as_rows(raw.images, raw.target)


def test_digits_say_what_they_are():
    kept = law.labels.bincount() / 1500
    held = law.test_labels.bincount() / 297
    assert (kept - held).abs().max() < 0.003
    assert law.shape == (1, 8, 8)
    assert law.classes == 10
    assert law.names == tuple("0123456789")
    assert law.features == "digits" and law.name == "digits"


def test_split_follows_its_seed():
    assert torch.equal(digits().points, law.points)
    assert torch.equal(build("pictures", "digits").test, law.test)
    other = build("pictures", {"name": "digits", "seed": 1, "held_out": 100})
    assert other.test.shape == (100, 1, 8, 8)
    assert len(other.points) == 1697
    assert not torch.equal(other.test, law.test[:100])


def test_sample_gives_pictures_with_their_labels():
    x, y = law.sample(500, seeded(1))
    distance, which = nearest(x, law.points)
    assert (distance < 1e-5).all()
    assert torch.equal(law.labels[which], y)
    assert len(which.unique()) > 300
    assert torch.equal(x, law.sample(500, seeded(1))[0])


# --------------------------------------------------------------------------- judging
def test_reader_reads_held_out_digits_and_is_fooled_by_means():
    assert agreement(law.test, law.test_labels) > 0.95
    assert agreement(noise(500), torch.arange(500) % 10) < 0.2
    means = class_means()
    assert agreement(means, torch.arange(10)) == 1
    y = torch.arange(100) % 10
    assert spread(means[y], y) < 1e-9
    assert 3 < spread(law.test, law.test_labels) < 3.6


def test_reader_is_the_classifier_of_sklearn():
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier(
        (64,), alpha=1.0, learning_rate_init=5e-3, max_iter=500, random_state=3
    )
    classifier.fit(law.points.flatten(1).numpy(), law.labels.numpy())
    expected = torch.tensor(classifier.predict_proba(law.test.flatten(1).numpy()))
    reader = digit_reader(3)
    found = reader.logits(law.test).softmax(1)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)
    assert reader(law.test).shape == (297, 64)
    assert (reader(law.test) >= 0).all()
    assert not any(p.requires_grad for p in reader.parameters())


def test_reader_is_made_anew_and_equal():
    first = build("features", "digits")
    second = build("features", "digits")
    assert first is not second
    assert torch.equal(first(law.test), second(law.test))
    first.hidden.weight.data.zero_()
    assert agreement(law.test, law.test_labels) > 0.95


def test_features_serve_the_metrics():
    from soflow_edu.metrics import extract, frechet

    kept = extract(law.points, law.features)
    held = extract(law.test, law.features)
    negative = extract(-law.test, law.features)
    assert kept.shape == (1500, 64)
    assert frechet(kept, held) < 0.1 * frechet(kept, negative)


def test_nearest_is_the_brute_force():
    a = noise(30, 1)
    b = noise(20, 2)
    all_pairs = (a[:, None] - b[None]).double().pow(2).flatten(2).sum(2).sqrt()
    distance, which = nearest(a, b)
    assert torch.allclose(distance, all_pairs.min(1).values, atol=1e-6)
    assert torch.equal(which, all_pairs.argmin(1))


def test_spread_is_that_of_the_definition():
    y = torch.arange(200) % 4
    x = noise(200, 3, (5,)) * 2 + y[:, None] * 50
    squares = []
    for i in range(200):
        mean = x[y == y[i]].numpy().mean(0)
        squares.append(np.sum((x[i].numpy() - mean) ** 2))
    assert spread(x, y) == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)


# --------------------------------------------------------------- pictures on a page
@pytest.mark.parametrize("channels,shown", [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_mosaic_puts_pictures_where_they_belong(channels, shown):
    x = torch.rand(5, channels, 4, 5, generator=seeded(0)) * 2 - 1
    whole = mosaic(x, columns=4, gap=2)
    if whole.ndim == 2:
        whole = whole[..., None]
    assert whole.shape == (14, 30, shown)
    white = whole.clone()
    for i in range(5):
        top = 2 + i // 4 * 6
        left = 2 + i % 4 * 7
        place = (slice(top, top + 4), slice(left, left + 5))
        expected = (x[i, :shown].permute(1, 2, 0) + 1) / 2
        torch.testing.assert_close(whole[place], expected)
        white[place] = 1
    assert (white == 1).all()


def test_show_pictures_draws_words_and_no_axes():
    import matplotlib

    matplotlib.use("agg")
    titles = ["a", "b", "c", "d", "e", "f"]
    rows = ["first", "second"]
    figure = show_pictures(law.points[:6], titles=titles, rows=rows, columns=3)
    (ax,) = figure.axes
    assert [text.get_text().strip() for text in ax.texts] == titles + rows
    assert not ax.axison
    height, width = ax.images[0].get_array().shape
    assert all(text.get_position()[1] < height for text in ax.texts)
    assert width == 3 * 9 + 1
    assert show_pictures(law.points[:3], ax=ax) is figure


def test_show_pictures_shows_colours():
    figure = show_pictures(coloured().points[:3])
    assert figure.axes[0].images[0].get_array().shape[2] == 3


# ----------------------------------------------------------------------- the network
def test_network_is_zero_at_first_and_uses_everything_it_is_told():
    net = ConvNet(size=16, channels=3, width=8, depth=2, patch=4, classes=5)
    x = noise(4, 1, (3, 16, 16))
    t = torch.linspace(0.2, 0.9, 4)
    y = torch.tensor([0, 2, 4, 5])
    assert (net(x, t, t / 2, y) == 0).all()
    randomise(net, 0.3)
    out = net(x, t, t / 2, y)
    assert out.shape == x.shape
    others = [
        net(-x, t, t / 2, y),
        net(x, t / 3, t / 2, y),
        net(x, t, t / 3, y),
        net(x, t, t / 2, (y + 1) % 6),
    ]
    for other in others:
        assert ((out - other).flatten(1).abs().max(1).values > 1e-4).all()
    unlabelled = net(x, t, t / 2)
    assert torch.equal(unlabelled, net(x, t, t / 2, torch.full((4,), 5)))


def test_rows_do_not_mix():
    net = ConvNet(size=16, channels=3, width=8, depth=2, patch=4, classes=5)
    randomise(net, 0.3)
    x = noise(4, 1, (3, 16, 16))
    t = torch.linspace(0.2, 0.9, 4)
    y = torch.tensor([0, 2, 4, 5])
    row = slice(1, 2)
    alone = net(x[row], t[row], t[row] / 2, y[row])
    together = net(x, t, t / 2, y)[row]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_network_is_described_with_and_without_classes():
    net = ConvNet(size=16, channels=3, width=8, depth=2, patch=4, classes=5)
    assert net.spec() == describe(build("network", net.spec()))
    assert net.classes == 5
    plain = ConvNet(width=8, depth=1)
    t = torch.linspace(0.2, 0.9, 2)
    assert plain.classes == 0 and plain.labels is None
    assert not SolutionModel(plain).conditional
    assert plain(noise(2), t, t).shape == (2, 1, 8, 8)


def test_every_weight_learns():
    torch.manual_seed(0)
    model, objective = assemble(load_config("digits"))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(6):
        batch = Batch(*law.sample(32, seeded(step)))
        times = objective.draw(batch, 0.5, seeded(step))
        loss = objective.loss(model, batch, times, 0.5)
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
    for weights in model.parameters():
        assert weights.grad is not None
        assert weights.grad.abs().max() > 0
    for block in model.net.blocks:
        scales, shifts = block.told.weight.grad.chunk(2)
        assert scales.abs().max() > 0
        assert shifts.abs().max() > 0


# --------------------------------------------------------------------------- the run
def trained_on(data, config):
    "The run of a configuration on a law, at its end."
    for step in train(*assemble(config), data, config):
        run = step.run
    return run


def digits_after(steps: int):
    config = replace(load_config("digits"), steps=steps, seconds=None)
    return trained_on(law_of(config.data), config)


@pytest.fixture(scope="module")
def run():
    return digits_after(30)


def test_configuration_is_within_its_budget():
    config = load_config("digits")
    assert config.seconds <= 60
    assert config.data == "digits"
    assert law_of(config.data).shape == (1, 8, 8)
    assert config.objective["target"]["name"] == "guided"


@pytest.mark.slow
def test_one_step_digits_are_read_as_asked_for_and_are_no_copies():
    run = digits_after(300)
    y = torch.arange(300) % 10
    x = sample(trained(run), noise(300, 5), 1, y=y).clamp(-1, 1)
    assert agreement(x, y) > 0.9
    assert agreement(x, (y + 1) % 10) < 0.05
    assert spread(x, y) > 1.2
    assert nearest(x, law.points)[0].min() > 0.5
    assert nearest(x, law.test)[0].mean() < 3.2
    to_samples = nearest(law.test, x)[0].mean()
    to_means = nearest(law.test, class_means())[0].mean()
    assert to_samples < to_means - 0.2


def test_run_is_saved_and_loaded(run, tmp_path):
    save_run(tmp_path, run)
    back = load_run(tmp_path)
    x = noise(20, 1)
    y = torch.arange(20) % 10
    before = sample(trained(run), x, 1, y=y)
    assert torch.equal(sample(back.model, x, 1, y=y), before)
    assert isinstance(back.model.net, ConvNet)
    assert isinstance(law_of(back.config.data), Pictures)
    target = build("objective", back.objective).target
    assert target.w == run.objective["target"]["w"]


def test_run_is_loaded_without_an_import(run, tmp_path):
    save_run(tmp_path, run)
    code = (
        "from soflow_edu.training import load_run; "
        f"run = load_run({str(tmp_path)!r}); print(type(run.model.net).__name__)"
    )
    assert printed_by(code) == "ConvNet"


def test_compare_takes_both_truths(run):
    model = trained(run)
    x = noise(40, 2)
    y = torch.arange(40) % 10
    by_dopri5 = OdeFlow(model, rtol=1e-3)
    own = compare(model, by_dopri5, x, y, metrics=("one_step", "properties")).values
    flow = ExactFlow(law, model.path, 1.25)
    exact = compare(model, flow, x, y, metrics=("one_step",)).values
    assert own["relative_rmse"] < exact["relative_rmse"]
    assert own["semigroup_defect"] > 0


@pytest.mark.parametrize("w", [1.0, 1.5])
def test_exact_map_copies(w):
    x = noise(60, 3)
    y = torch.arange(60) % 10
    ends = ExactFlow(law, build("path", "linear"), w).solution(x, 1.0, 0.0, y)
    distance, which = nearest(ends, law.points)
    assert (distance < 1e-2).all()
    assert torch.equal(law.labels[which], y)
    assert len(which.unique()) > 40


def test_three_colours_pass_through_the_same_verbs():
    network = {"name": "conv", "channels": 3, "width": 8, "depth": 1, "patch": 2}
    network |= {"classes": 4}
    base = load_config("digits")
    config = replace(base, network=network, steps=3, seconds=None, batch=16)
    model = trained(trained_on(coloured(), config))
    x = sample(model, noise(4, 1, (3, 8, 8)), 2, y=torch.arange(4))
    assert x.shape == (4, 3, 8, 8)


# ------------------------------------------------------------------------- bad input
x = law.points[:30]
y = law.labels[:30]
tx = law.test[:20]
ty = law.test_labels[:20]
ones = torch.ones(30)


def made(points=x, labels=y, test=tx, test_labels=ty, names=range(10)):
    return Pictures("made", points, labels, test, test_labels, names)


def broken(value):
    "The pictures with a value in one place."
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
    (lambda: ConvNet()(x, ones, ones, y), "no classes"),
    (lambda: ConvNet()(x[:, 0], ones, ones), "(30, 8, 8)"),
    (lambda: ConvNet()(x[..., :7], ones, ones), "(30, 1, 8, 7)"),
    (lambda: ConvNet(channels=3)(x, ones, ones), "(B, 3, 8, 8)"),
    (lambda: ConvNet()(x, ones[:3], ones), "t has shape (3,)"),
    (lambda: ConvNet()(x, ones, ones[:, None]), "d = t - s"),
    (lambda: ConvNet(classes=10)(x, ones, ones, y + 2), "10 for no label"),
    (lambda: ConvNet(classes=10)(x, ones, ones, y.float()), "30 integers"),
]
NUMBERED = [f"{i:02d} {words}" for i, (_, words) in enumerate(BAD)]


@pytest.mark.parametrize("call,words", BAD, ids=NUMBERED)
def test_bad_input_is_refused_in_words(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)


def test_components_are_found_by_name_alone():
    "Without the heavy libraries that they need later."
    code = """
import sys
from soflow_edu.config import find
find("pictures", "digits"), find("network", "conv"), find("features", "digits")
print([name for name in ("sklearn", "matplotlib") if name in sys.modules])
"""
    assert printed_by(code) == "[]"
    assert find("pictures", "digits") is digits
