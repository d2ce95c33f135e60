"""Metrics of pictures: closed forms, libraries, invariances, chance, bias, bad input.

With the real data root where there is one, else on pictures that are made here."""

import importlib.util
import io
import os
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from faults import within
from helpers import complaint
from soflow_edu import metrics
from soflow_edu.comparing import precision_recall
from soflow_edu.core import InputError, build
from soflow_edu.metrics import (
    Inception,
    Judging,
    Moments,
    ResNet56,
    as_uint8,
    batches,
    evaluate_samples,
    extract,
    frechet,
    frechet_bias,
    kid,
    mmd2,
    moments,
    read_arrays,
    read_npz,
    resnet56,
    score,
    to_floats,
    write_npz,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, d, generator=seeded(seed)).double()


def rendered(n, seed, width=32):
    "Discs of random colour, place and size on shades, uint8 (n, width, width, 3)."
    g = seeded(seed)
    edge = torch.linspace(-1, 1, width)
    row, column = torch.meshgrid(edge, edge, indexing="ij")
    span = torch.tensor([1.2, 1.2, 0.5])[:, None, None, None]
    least = torch.tensor([-0.6, -0.6, 0.2])[:, None, None, None]
    x, y, radius = torch.rand(3, n, 1, 1, generator=g) * span + least
    inside = ((row - y) ** 2 + (column - x) ** 2 < radius**2)[..., None]
    shade = 0.6 + 0.4 * row[None, :, :, None]
    ground = torch.rand(n, 1, 1, 3, generator=g) * shade
    colour = torch.rand(n, 1, 1, 3, generator=g)
    return (255 * torch.where(inside, colour, ground)).to(torch.uint8)


def normal_like(x):
    return torch.randn(x.shape, generator=seeded(0))


def parquet_files(part):
    "Files of CIFAR-10 in the data root; none without a root or a reader of parquet."
    root = os.environ.get("SOFLOW_DATA")
    if not root or not importlib.util.find_spec("pyarrow"):
        return []
    return sorted(Path(root).glob(f"cifar10/{part}-*.parquet"))


def real(part, most):
    "Pictures and labels of the CIFAR-10 in the data root."
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(parquet_files(part)[0])
    rows = table.slice(0, most).to_pydict()
    images = [Image.open(io.BytesIO(img["bytes"])) for img in rows["img"]]
    pictures = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pictures), torch.tensor(rows["label"])


class Pooled(nn.Module):
    "Cheap features: random filters, and their means over the picture."

    def __init__(self, count=8):
        super().__init__()
        self.filters = nn.Conv2d(3, count, 5, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=seeded(0)) / 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.filters(x).relu()).mean((2, 3))


# ------------------------------------------------------------------ Fréchet distance
def by_sqrtm(a, b):
    from scipy.linalg import sqrtm

    means = (a.mean - b.mean).square().sum()
    traces = a.cov.trace() + b.cov.trace()
    cross = np.trace(sqrtm((a.cov @ b.cov).numpy()).real)
    return (means + traces).item() - 2 * cross


def diagonal(mean, std):
    variances = torch.tensor(std).double().square()
    return Moments(torch.tensor(mean).double(), variances.diag())


def test_frechet_of_gaussians_without_correlation():
    a = diagonal([1.0, 2.0, 3.0], [1.0, 2.0, 0.0])
    b = diagonal([0.0, 2.0, 5.0], [4.0, 2.0, 0.5])
    assert frechet(a, b) == pytest.approx(1 + 4 + 9 + 0.25, abs=1e-10)


def test_frechet_of_a_rotation():
    "In the plane, the root of A^1/2 B A^1/2 has the trace sqrt(tr AB + 2 sqrt det AB)."
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    a = torch.tensor([4.0, 1.0]).double().diag()
    b = turn @ a @ turn.T
    cross = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt().item()
    zero = torch.zeros(2).double()
    found = frechet(Moments(zero, a), Moments(zero, b))
    assert found == pytest.approx(10 - 2 * cross, abs=1e-10)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_frechet_agrees_with_scipy(d):
    z = normal(3 * d + 20, d, 1) @ normal(d, d, 2)
    a = moments(z)
    b = moments(normal(2 * d + 20, d, 3, 0.7, 0.4))
    assert frechet(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert torch.allclose(a.cov, torch.as_tensor(np.cov(z.numpy().T)).view(d, d))


def test_frechet_of_singular_covariances_stays_real():
    "Features that never fire have no variance; others copy each other."
    z = normal(200, 6, 1)
    never = torch.zeros(200, 3)
    a = torch.cat([z, z, never], 1)
    b = torch.cat([2 * z, 2 * z, never], 1)
    half = frechet(moments(z), moments(2 * z))
    assert frechet(a, b) == pytest.approx(2 * half, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_is_symmetric_and_scales():
    a = normal(300, 10, 1)
    b = normal(250, 10, 2, 1.3, 0.2)
    distance = frechet(a, b)
    assert frechet(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet(a + 7, b + 7) == pytest.approx(distance, rel=1e-9)
    assert frechet(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-9)


def test_metrics_do_not_change_under_orthogonal_maps():
    a = normal(300, 10, 1)
    b = normal(250, 10, 2, 1.3, 0.2)
    turn = torch.linalg.qr(normal(10, 10, 3))[0]
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-9)
    squared = mmd2(a, b).item()
    assert mmd2(b, a).item() == pytest.approx(squared)
    assert mmd2(a @ turn, b @ turn).item() == pytest.approx(squared)
    shares = precision_recall(a, b, 3)
    assert shares == precision_recall(a @ turn, b @ turn, 3)
    assert shares == precision_recall(b, a, 3)[::-1]


def test_equal_sets_are_at_distance_zero():
    z = normal(400, 12, 1)
    mixed = z[torch.randperm(400, generator=seeded(1))]
    assert frechet(z, z) == pytest.approx(0, abs=1e-9)
    assert frechet(z, mixed) == pytest.approx(0, abs=1e-9)
    assert precision_recall(z, z, 3) == (1, 1)


@pytest.mark.parametrize("n,m", [(300, 300), (300, 900), (1200, 1200)])
def test_bias_of_frechet_is_the_predicted_one(n, m):
    stds = torch.linspace(0.3, 2, 10)
    found = []
    for i in range(60):
        a = normal(n, 10, 2 * i) * stds
        b = normal(m, 10, 2 * i + 1) * stds
        found.append(frechet(a, b))
    predicted = frechet_bias(stds.square().diag(), n, m)
    assert np.mean(found) == pytest.approx(predicted, rel=0.1)
    assert frechet_bias(torch.eye(10), 100) == pytest.approx((10 + 10 * 11 / 4) / 100)


# ------------------------------------------------------------------- kernel distance
def kernel(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


def mean_kernel(x, y, ix, iy, same):
    "Over pairs of points, which may repeat; in one set, none of a point and itself."
    kernels = []
    for i in ix:
        kernels += [kernel(x[i], y[j]) for j in iy if not (same and i == j)]
    return np.mean(kernels)


def double_sum(a, b, ia, ib):
    within = mean_kernel(a, a, ia, ia, True) + mean_kernel(b, b, ib, ib, True)
    return within - 2 * mean_kernel(a, b, ia, ib, False)


def test_kernel_distance_is_the_double_sum():
    a = normal(9, 4, 1)
    b = normal(7, 4, 2, 1.2, 0.3)
    expected = double_sum(a.numpy(), b.numpy(), range(9), range(7))
    assert mmd2(a, b).item() == pytest.approx(expected)


def test_kernel_distance_of_points_drawn_again_is_the_double_sum():
    a = normal(9, 4, 1)
    b = normal(7, 4, 2, 1.2, 0.3)
    ia = [0, 0, 3, 4, 4, 4, 7, 8, 1]
    ib = [6, 6, 5, 0, 2, 2, 1]
    wa = torch.tensor(np.bincount(ia, minlength=9))[None]
    wb = torch.tensor(np.bincount(ib, minlength=7))[None]
    expected = double_sum(a.numpy(), b.numpy(), ia, ib)
    assert mmd2(a, b, wa, wb).item() == pytest.approx(expected)


def is_mean(values, expected):
    "Whether a mean lies within three and a half standard errors."
    return abs(values.mean() - expected) < 3.5 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("n", [10, 40, 160])
def test_kernel_distance_has_no_bias_at_any_size(n):
    pairs = [(normal(n, 6, 2 * i), normal(n, 6, 2 * i + 1)) for i in range(150)]
    values = torch.cat([mmd2(a, b) for a, b in pairs])
    assert is_mean(values, 0)
    assert (values < 0).any()


def expected_kernel(p, q):
    "The mean cubic kernel of N(p, 1) and N(q, 1), independent, in one dimension."
    squares = (p * p + 1) * (q * q + 1)
    cubes = (p**3 + 3 * p) * (q**3 + 3 * q)
    return 1 + 3 * p * q + 3 * squares + cubes


def test_kernel_distance_of_two_normal_laws():
    mu = 0.5
    values = []
    for i in range(40):
        shifted = normal(400, 1, 2 * i, shift=mu)
        values.append(mmd2(shifted, normal(400, 1, 2 * i + 1)))
    within = expected_kernel(mu, mu) + expected_kernel(0, 0)
    assert is_mean(torch.cat(values), within - 2 * expected_kernel(mu, 0))


def kid_value(a, b, size):
    return kid(a, b, size=size).item()


def test_blocks_agree_with_the_whole():
    a = normal(700, 6, 1, shift=0.4)
    b = normal(450, 6, 2)
    whole = mmd2(a, b).item()
    assert kid_value(a, b, 700) == pytest.approx(whole)
    assert kid_value(a, b, 100) == pytest.approx(whole, rel=0.3)
    assert kid_value(a, b, 100) == kid_value(a, b, 100)
    assert len(kid(a, b, resamples=5)) == 6
    assert kid(a[:5], b, size=10).isfinite().all()


def test_blocks_use_every_point_once():
    "Sets come in order, and no block may be left out."
    a = normal(700, 6, 1, shift=0.4)
    b = normal(450, 6, 2)
    marked = a.clone()
    marked[650:] += 5
    assert kid_value(marked, b, 100) > 1.5 * kid_value(a, b, 100)


def test_no_block_is_larger_than_asked_for():
    a = normal(700, 6, 1, shift=0.4)[:150]
    b = normal(450, 6, 2)[:150]
    whole = mmd2(a, b).item()
    assert kid_value(a, b, 100) != pytest.approx(whole, rel=1e-6)


class Flat(nn.Module):
    "Features for torchmetrics, which reads them through a module: the identity."

    num_features = 7

    def forward(self, x):
        return x.flatten(1)


def test_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a = normal(120, 7, 1).float()
    b = normal(90, 7, 2, 1.2, 0.3).float()
    fid = FrechetInceptionDistance(Flat(), input_img_size=(7, 1, 1))
    fid = fid.set_dtype(torch.float64)
    kernel_distance = KernelInceptionDistance(Flat(), subsets=1, subset_size=90)
    for metric in (fid, kernel_distance):
        metric.update(a[:, :, None, None], real=False)
        metric.update(b[:, :, None, None], real=True)
    assert frechet(a, b) == pytest.approx(fid.compute().item(), rel=1e-4)
    torch.manual_seed(0)
    kernel_distance.fake_features = [a[:90]]
    kernel_distance.real_features = [b]
    expected = kernel_distance.compute()[0].item()
    assert mmd2(a[:90], b).item() == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------- reports
SIGNS = {"frechet": 1, "kid": 1, "precision": -1}


def test_every_metric_follows_growing_noise():
    data = rendered(600, 1)
    other = rendered(600, 2)
    noise = normal_like(other)
    reports = []
    for level in (0, 40, 120):
        spoilt = (other + level * noise).clamp(0, 255).to(torch.uint8)
        report = evaluate_samples(spoilt, data, Pooled(), resamples=0)
        reports.append(report.values)
    for name, sign in SIGNS.items():
        values = [sign * report[name] for report in reports]
        assert values == sorted(values), name
        assert values[2] > values[0], name


def judged(**changes):
    "A report of 200 pictures beside 300."
    options = {"resamples": 30, "confidence": 0.9, "seed": 3} | changes
    return evaluate_samples(rendered(200, 2), rendered(300, 1), Pooled(), **options)


def test_report_says_what_was_done():
    report = judged()
    assert (report.samples, report.data, report.features) == (200, 300, 8)
    assert set(report.values) == {"frechet", "kid", "precision", "recall"}
    for s in report.scores.values():
        assert s.low <= s.value <= s.high
        assert s.error > 0
    assert report.scores["kid"].bias is None
    assert "200 samples beside 300" in report.table
    assert "90 % intervals of 30 resamples" in report.table
    assert f"{report.values['frechet']:.4f}" in report.table


def test_report_follows_its_seed_and_takes_features():
    report = judged()
    net = Pooled()
    data = extract(rendered(300, 1), net)
    options = {"resamples": 30, "confidence": 0.9, "seed": 3}
    again = evaluate_samples(rendered(200, 2), data, net, **options)
    assert again.scores == report.scores
    assert judged(seed=4).scores != report.scores


def test_more_confidence_is_a_wider_interval():
    wide = judged(confidence=0.99).scores
    for name, s in judged().scores.items():
        assert wide[name].low <= s.low
        assert s.high <= wide[name].high


def test_report_without_resamples_has_no_interval():
    none = judged(resamples=0, metrics="kid")
    assert none.scores["kid"].low is None
    assert "-" in none.table
    assert none.values == {"kid": pytest.approx(judged().values["kid"])}


LAWS = {"same": (1.0, 0.0), "wider": (1.2, 0.3), "narrower": (0.7, 0.1)}


@pytest.mark.parametrize("scale,shift", LAWS.values(), ids=LAWS)
def test_intervals_are_as_wide_as_chance(scale, shift):
    "Errors and bias from one draw, against the spread and the bias of fresh draws."
    draws = []
    for i in range(40):
        other = normal(250, 8, 2 * i, scale, shift)
        data = normal(250, 8, 2 * i + 1)
        draws.append(evaluate_samples(other, data, resamples=25, seed=i).scores)
    for name in draws[0]:
        error = np.mean([scores[name].error for scores in draws])
        spread = np.std([scores[name].value for scores in draws], ddof=1)
        assert 0.65 < error / spread < 2.2, (name, error / spread)
    other = normal(200_000, 8, 1001, scale, shift)
    truth = frechet(normal(200_000, 8, 1000), other)
    found = [scores["frechet"] for scores in draws]
    bias = np.mean([s.value for s in found]) - truth
    assert np.mean([s.bias for s in found]) == pytest.approx(bias, rel=0.4)
    held = [s.low - s.bias <= truth <= s.high - s.bias for s in found]
    assert np.mean(held) > 0.8


def test_interval_holds_the_middle_of_the_replicates():
    found = score(7.0, torch.arange(101.0), confidence=0.9, biased=True)
    assert (found.low, found.high) == pytest.approx((7 - 45, 7 + 45))
    assert found.bias == pytest.approx(43)
    assert found.error == pytest.approx(29.3, abs=0.01)
    within = score(7.0, torch.arange(101.0), least=0, most=10)
    assert (within.low, within.high, within.bias) == (0, 10, None)


def test_precision_and_recall_resample_halves_without_copies(monkeypatch):
    seen = []

    def watched(a, b, k):
        seen.append((a, b, k))
        return precision_recall(a, b, k)

    monkeypatch.setattr(metrics, "precision_recall", watched)
    how = Judging(resamples=3, k=2, most=80)
    metrics.precision_recall_score(normal(90, 4, 1), normal(60, 4, 2), how)
    sizes = sorted((len(a), len(b), k) for a, b, k in seen)
    assert sizes == [(40, 30, 2)] * 3 + [(80, 60, 2)]
    for a, b, _ in seen:
        assert len(a.unique(dim=0)) == len(a)
        assert len(b.unique(dim=0)) == len(b)


# ------------------------------------------------------------- pictures and features
def test_floats_and_levels_give_the_same_numbers():
    x = rendered(40, 1)
    floats = to_floats(x)
    net = Pooled()
    expected = extract(x, net, batch=9)
    forms = [
        x.numpy(),
        floats,
        floats.double().numpy(),
        iter([x[:7], x[7:]]),
        [floats[:30], floats[30:]],
    ]
    for form in forms:
        assert torch.allclose(extract(form, net, batch=9), expected, atol=1e-6)
    whole = extract(x, net, batch=40)
    assert torch.allclose(whole, extract(x, net, batch=3), atol=1e-6)
    nearly = (floats + 0.4 / 127.5).clamp(-1, 1)
    assert as_uint8(nearly).equal(x)  # rounded, not cut


def test_extraction_leaves_the_module_alone():
    net = Pooled().train()
    seen = []

    def watch(module, args, out):
        seen.append((len(args[0]), module.training, out.requires_grad))

    net.register_forward_hook(watch)
    z = extract(rendered(10, 1), net, batch=4, device="cpu")
    assert net.training
    assert seen == [(4, False, False), (4, False, False), (2, False, False)]
    assert z.dtype == torch.float32
    assert z.device.type == "cpu"


def test_extraction_takes_one_batch_at_a_time():
    seen = []

    def source():
        for i in range(3):
            seen.append(i)
            yield rendered(3, i)

    def features(x):
        seen.append("f")
        return x.flatten(1)

    extract(source(), features)
    assert seen == [0, "f", 1, "f", 2, "f"]


def flat(x):
    return x.flatten(1)


def test_features_get_pictures_from_minus_one_on():
    assert extract(rendered(4, 1), flat).min() >= -1


def with_column(x, value):
    "Floats of which one column of pixels has another value."
    return to_floats(x).where(torch.arange(32) != 5, value)


BAD = {
    "float in 0..1": (lambda x: x.permute(0, 3, 1, 2) / 255, "2 \\* x - 1"),
    "float in 0..255": (lambda x: x.permute(0, 3, 1, 2).float(), "give uint8"),
    "steps over the edge": (lambda x: to_floats(x) - 0.1, "clamp"),
    "NaN": (lambda x: with_column(x, torch.nan), "NaN or infinite"),
    "infinite": (lambda x: with_column(x, torch.inf), "NaN or infinite"),
    "int64": (lambda x: x.long(), "int64"),
    "bool": (lambda x: x > 9, "bool"),
    "uint8 with channels first": (lambda x: x.permute(0, 3, 1, 2), "Permute"),
    "float with channels last": (lambda x: x / 127.5 - 1, "Permute"),
    "four channels": (lambda x: torch.cat([x, x[..., :1]], 3), "1 or 3 channels"),
    "one picture": (lambda x: x[0], "shape"),
    "no pictures": (lambda x: x[:0], "shape"),
    "nothing": (lambda x: None, "NoneType"),
    "number": (lambda x: 3, "int"),
    "words": (lambda x: np.array(["a"]), "Give uint8"),
    "list of numbers": (lambda x: [1, 2], "Give an array or a tensor"),
    "empty iterable": (lambda x: [], "empty"),
    "missing file": (lambda x: "nowhere.npz", "missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_in_words(name):
    spoil, words = BAD[name]
    with pytest.raises(InputError, match=words):
        evaluate_samples(spoil(rendered(60, 1)), rendered(60, 2), Pooled())
    with pytest.raises(InputError, match=words):
        evaluate_samples(rendered(60, 2), spoil(rendered(60, 1)), Pooled())


def one_number(x):
    return x.mean((1, 2, 3))


def not_a_number(x):
    return x.flatten(1) * torch.nan


def same_pictures(x):
    return x


X = rendered(60, 1)
GREY = X[..., :1]
BAD_CALLS = [
    ((X, X, None), "without features"),
    ((X, X, "resnet65"), "Did you mean 'resnet56'"),
    ((X, X, 7), "module or a function"),
    ((X, rendered(60, 1, 16), Pooled()), "one size"),
    ((X[:8], X, Pooled()), "covariance of 8 features"),
    ((X, X[:8], Pooled()), "covariance of 8 features"),
    ((X, normal(60, 5, 1), Pooled()), "8 features and the data 5"),
    ((X, X, same_pictures), r"\(60, D\)"),
    ((X, X, one_number), "expected"),
    ((X, X, not_a_number), "NaN or infinite"),
    ((GREY, GREY, ResNet56()), "colour"),
]
BAD_OPTIONS = [
    ({"metrics": "frechett"}, "Did you mean 'frechet'"),
    ({"resample": 3}, "Did you mean 'resamples'"),
    ({"resamples": -1}, "resamples"),
    ({"resamples": 1}, "resamples"),
    ({"confidence": 95}, "confidence"),
    ({"k": 0}, "k is 0"),
    ({"device": "gpu"}, "device"),
]


@pytest.mark.parametrize("args,words", BAD_CALLS, ids=[words for _, words in BAD_CALLS])
def test_sets_that_cannot_be_judged_are_refused_in_words(args, words):
    with pytest.raises(InputError, match=words):
        evaluate_samples(*args)


@pytest.mark.parametrize("options,words", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_in_words(options, words):
    with pytest.raises(InputError, match=words):
        evaluate_samples(X, X, Pooled(), **options)


def test_too_few_pictures_are_refused_in_words():
    with pytest.raises(InputError, match="at least 8"):
        evaluate_samples(X[:7], X, Pooled(), metrics="precision_recall")
    with pytest.raises(InputError, match="at least two rows"):
        evaluate_samples(X[:1], X, Pooled(), metrics="kid")


@pytest.mark.parametrize("metric", [frechet, kid])
def test_sets_of_other_features_are_refused_in_words(metric):
    with pytest.raises(InputError, match="4 and 5 features"):
        metric(normal(60, 4, 1), normal(60, 5, 1))


def test_features_that_are_no_numbers_are_refused_in_words():
    with pytest.raises(InputError, match="NaN or infinite"):
        frechet(normal(60, 4, 1) * torch.nan, normal(60, 4, 1))


# ----------------------------------------------------------------------------- files
def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_files_for_other_evaluators(tmp_path):
    x = rendered(30, 1)
    path = write_npz(tmp_path / "deep" / "samples.npz", to_floats(x))
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert (file["arr_0"] == x.numpy()).all()
        assert file["arr_0"].flags.c_contiguous
    assert read_npz(str(path)).equal(x)
    parts = tmp_path / "parts.npz"
    write_npz(parts, (x[i : i + 7] for i in range(0, 30, 7)))
    assert read_npz(parts).equal(x)
    report = evaluate_samples(path, parts, Pooled(), resamples=0)
    assert report.values["frechet"] == pytest.approx(0, abs=1e-9)
    assert names_in(tmp_path) == {"deep", "parts.npz"}
    assert names_in(tmp_path / "deep") == {"samples.npz"}


def test_files_of_other_writers_are_read(tmp_path):
    x = rendered(30, 1)
    path = tmp_path / "small.npz"
    np.savez_compressed(path, arr_0=x.numpy(), arr_1=np.zeros(30))
    assert read_npz(path).equal(x)


def test_a_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    x = rendered(5, 1)
    path = write_npz(tmp_path / "a.npz", x)

    def full(*args, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError):
        write_npz(path, rendered(9, 2))
    assert read_npz(path).equal(x)
    assert names_in(tmp_path) == {"a.npz"}


@pytest.fixture
def whole(tmp_path):
    "The bytes of a good file."
    return write_npz(tmp_path / "a.npz", rendered(20, 1)).read_bytes()


def check_refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_npz(path)


def test_files_that_are_cut_are_refused_in_words(tmp_path, whole):
    bad = tmp_path / "b.npz"
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        check_refused(bad, whole[:end], "not a whole .npz")
    pickled = b"\x80\x04" + bytes(200)
    check_refused(bad, pickled, "not a whole .npz")


def test_files_with_wrong_bytes_are_refused_in_words(tmp_path, whole):
    for place in (150, len(whole) // 2, len(whole) - 300):
        end = place + 4
        wrong = bytes(255 - byte for byte in whole[place:end])
        content = whole[:place] + wrong + whole[end:]
        check_refused(tmp_path / "b.npz", content, "damaged")


OTHER_ARRAYS = [
    ({"samples": np.zeros((2, 4, 4, 3), np.uint8)}, "lacks arr_0"),
    ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "Permute|uint8"),
    ({"arr_0": np.zeros((2, 3, 4, 4), np.float32) - 1}, "uint8"),
    ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "Permute"),
    ({"arr_0": np.array([{}, {}], dtype=object)}, "objects"),
    ({}, "nothing"),
]


def test_files_of_something_else_are_refused_in_words(tmp_path):
    for arrays, words in OTHER_ARRAYS:
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(InputError, match=words):
            read_npz(tmp_path / "b.npz")
    with pytest.raises(InputError, match="folder"):
        read_npz(tmp_path)


def test_what_cannot_be_written_is_refused_in_words(tmp_path):
    two_sizes = [rendered(2, 1), rendered(2, 1, 16)]
    (tmp_path / "d.npz").mkdir()
    cases = [
        ("a.png", rendered(2, 1), "end in .npz"),
        ("c.npz", [], "No pictures"),
        ("c.npz", two_sizes, "different sizes"),
        ("d.npz", rendered(2, 1), "folder"),
    ]
    for name, pictures, words in cases:
        with pytest.raises(InputError, match=words):
            write_npz(tmp_path / name, pictures)
    assert not (tmp_path / "c.npz").exists()


# -------------------------------------------------------------------------- networks
def norm_by_hand(weights, name, x):
    parts = ("running_mean", "running_var", "weight", "bias")
    statistics = [weights[f"{name}.{part}"] for part in parts]
    return nn.functional.batch_norm(x, *statistics, eps=1e-5)


def block_by_hand(weights, name, stride, x):
    conv2d = nn.functional.conv2d
    y = conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
    y = norm_by_hand(weights, f"{name}.bn1", y).relu()
    y = conv2d(y, weights[f"{name}.conv2.weight"], padding=1)
    y = norm_by_hand(weights, f"{name}.bn2", y)
    if stride == 2:
        zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
        x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
    return (x + y).relu()


def resnet_by_hand(weights, x):
    "The 64 features of a ResNet-56, stated once more without modules."
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    x = ((x / 255 - mean) / std).permute(0, 3, 1, 2)
    x = nn.functional.conv2d(x, weights["conv1.weight"], padding=1)
    x = norm_by_hand(weights, "bn1", x).relu()
    for stage in (1, 2, 3):
        for block in range(9):
            stride = 2 if stage > 1 and block == 0 else 1
            x = block_by_hand(weights, f"layer{stage}.{block}", stride, x)
    return x.mean((2, 3))


def some_weights(tmp_path):
    "The weights of the data root, else random ones whose statistics are not trivial."
    root = os.environ.get("SOFLOW_DATA", "")
    path = Path(root) / "cifar_resnet56" / "resnet56.npz"
    if root and path.is_file():
        return path
    torch.manual_seed(0)
    weights = {}
    for name, tensor in ResNet56().state_dict().items():
        if "num_batches" in name:
            continue
        if "bn" in name:
            tensor = tensor + 0.2 * torch.rand_like(tensor)
        weights[name] = tensor.numpy()
    np.savez(tmp_path / "weights.npz", **weights)
    return tmp_path / "weights.npz"


def test_resnet56_is_the_network_of_its_weights(tmp_path):
    path = some_weights(tmp_path)
    arrays = read_arrays(path)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x = rendered(12, 1)
    with torch.no_grad():
        z = resnet_by_hand(weights, x)
    logits = z @ weights["linear.weight"].T + weights["linear.bias"]
    net = resnet56(path)
    torch.testing.assert_close(extract(x, net), z, rtol=1e-4, atol=1e-4)
    found = net.logits(to_floats(x))
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-3)
    named = {"name": "resnet56", "path": str(path)}
    by_name = extract(x, named, device="cpu")
    torch.testing.assert_close(by_name, z, rtol=1e-4, atol=1e-4)


def test_resnet56_is_ready_to_use(tmp_path):
    net = resnet56(some_weights(tmp_path))
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == 853_018


def test_resnet56_refuses_other_weights(tmp_path):
    arrays = read_arrays(some_weights(tmp_path))
    fewer = {name: array for name, array in arrays.items() if name != "conv1.weight"}
    longer = arrays | {"linear.bias": np.zeros(11, np.float32)}
    path = tmp_path / "other.npz"
    cases = [
        (longer, "1 tensors .* 'linear.bias'"),
        (arrays | {"extra": np.zeros(1)}, "'extra'"),
        (fewer, "'conv1.weight'"),
    ]
    for weights, words in cases:
        np.savez(path, **weights)
        with pytest.raises(InputError, match=words):
            resnet56(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole"):
        resnet56(path)


def test_resnet56_misses_its_weights_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFLOW_DATA", str(tmp_path))
    with pytest.raises(InputError, match="SOFLOW_DATA"):
        build("features", "resnet56")


def distances_of_noise(more, z, net):
    "Fréchet distances of pictures with growing noise from features."
    noise = normal_like(more)
    found = []
    for level in (0, 8, 64):
        spoilt = (more + level * noise).round().clamp(0, 255).to(torch.uint8)
        found.append(frechet(extract(spoilt, net), z))
    assert found[0] < found[1] < found[2]
    return found


@pytest.mark.slow
def test_classifier_orders_noise(tmp_path):
    """Of CIFAR-10 where it can be read, by the distances of its README at 2,000.

    Of the real pictures it reads 93.4 %. Else of pictures that are made here."""
    net = resnet56(some_weights(tmp_path))
    if not parquet_files("test"):
        distances_of_noise(rendered(200, 2), extract(rendered(200, 1), net), net)
        return
    x, labels = real("test", 2000)
    z = extract(x, net)
    right = (net.linear(z).argmax(1) == labels).double().mean().item()
    assert right == pytest.approx(0.934, abs=0.0125)  # two standard errors at 2,000
    assert frechet(z[labels == 3], z) == pytest.approx(40, rel=0.35)
    none, some, much = distances_of_noise(real("train", 2000)[0], z, net)
    assert none == pytest.approx(0.15, abs=0.08)
    assert some == pytest.approx(4.4, rel=0.2)
    assert much == pytest.approx(58.6, rel=0.1)


class FidelityNetwork(nn.Module):
    "In the place of torch-fidelity: checks what it is handed."

    def __init__(self, name, features_list, **options):
        super().__init__()
        assert name == "inception-v3-compat"
        assert features_list == ["2048"]
        assert options == {}
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1:] == (3, 32, 32)
        return (x.float().flatten(1)[:, :2048] * self.scale,)


@pytest.fixture
def fidelity(monkeypatch):
    "A module in the place of the one of torch-fidelity."
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = types.ModuleType(name)
    module.FeatureExtractorInceptionV3 = FidelityNetwork
    package = types.ModuleType("torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_inception_gets_levels_with_channels_first(fidelity):
    x = rendered(5, 1)
    expected = x.permute(0, 3, 1, 2).flatten(1)[:, :2048].float()
    assert extract(x, "inception", device="cpu").equal(expected)
    with pytest.raises(InputError, match="colour"):
        extract(x[..., :1], "inception", device="cpu")


def test_inception_without_its_weights(fidelity):
    def offline(*args):
        raise OSError("no network")

    fidelity.FeatureExtractorInceptionV3 = offline
    with pytest.raises(InputError, match="no network"):
        Inception()


class BrokenFinder:
    "Raises when torch-fidelity is imported, as a torchvision that does not fit does."

    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch_fidelity"):
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "torchvision"])
def test_inception_is_missed_in_words(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    if broken:
        monkeypatch.delitem(sys.modules, "torch_fidelity")
        monkeypatch.setattr(sys, "meta_path", [BrokenFinder(), *sys.meta_path])
    with pytest.raises(InputError, match="pip install soflow_edu\\[inception\\]"):
        evaluate_samples(rendered(4, 1), rendered(4, 2), "inception")


# ---------------------------------------------------------------------- damaged files
def declaring(path, shape, held, **how):
    "An .npz whose array declares a shape, but holds so many bytes."
    head = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w", **how) as archive,
        archive.open("arr_0.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, head)
        file.write(bytes(held))
    return path


def test_more_than_a_file_holds_is_refused_before_it_is_read(tmp_path):
    "With both numbers, and without the memory that it asks for."
    small = declaring(tmp_path / "small.npz", (10**6, 32, 32, 3), 3000)
    packed = declaring(
        tmp_path / "packed.npz",
        (400, 1024, 1024, 1),
        400 * 2**20,
        compression=zipfile.ZIP_DEFLATED,
    )
    black = tmp_path / "black.npz"
    np.savez_compressed(black, arr_0=np.zeros((50, 256, 256, 3), np.uint8))

    def check():
        assert "3,072,000,000 bytes, but 3,000" in complaint(read_npz, small)
        assert re.search(
            r"of 419,43\d,\d+ bytes, .* only \d", complaint(read_npz, packed)
        )
        assert read_npz(black).max() == 0  # small, though packed very tightly

    assert within(check, 2**28) == ""


def test_the_brightness_of_a_batch_is_no_reason_to_refuse_it():
    "The scale is judged over a whole set, and white all over is no other scale."
    x = torch.rand(9, 1, 8, 8)
    white = 0.9 + x / 10
    assert as_uint8(x[:1]).min() >= 127
    assert as_uint8(white).min() > 240
    assert torch.cat(list(batches([x[:4] * 2 - 1, x[4:]], 4))).shape == (9, 8, 8, 1)
    assert torch.cat(list(batches(white, 4))).min() > 240
    for form in (x, [x[:4], x[4:]]):
        assert "2 * x - 1" in complaint(list, batches(form, 4))


CUT = [OSError("no network"), RuntimeError("failed reading zip archive"), EOFError()]


@pytest.mark.parametrize("error", CUT, ids=lambda error: type(error).__name__)
def test_inception_whose_weights_were_cut(fidelity, monkeypatch, error):
    def failing(*args):
        raise error

    fidelity.FeatureExtractorInceptionV3 = failing
    monkeypatch.setenv("TORCH_HOME", "/hub")
    assert "/hub/hub/checkpoints" in complaint(Inception)
