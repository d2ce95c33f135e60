"Metrics of pictures: closed forms, libraries, invariances, chance and bias, bad input; with the real data root where there is one, else on pictures made here."
import importlib.util
import io
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from soflow_edu import metrics
from soflow_edu.comparing import precision_recall
from soflow_edu.core import InputError, build
from soflow_edu.metrics import (Inception, Judging, Moments, ResNet56, as_uint8, evaluate_samples, extract, frechet, frechet_bias, kid, mmd2, moments,
                                read_arrays, read_npz, resnet56, score, write_npz)


def normal(n, d, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()


def rendered(n, seed, width=32):
    "Discs of random colour, place and size on a shaded ground, uint8 (n, width, width, 3)."
    g = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.linspace(-1, 1, width), torch.linspace(-1, 1, width), indexing="ij")
    x, y, radius = torch.rand(3, n, 1, 1, generator=g) * torch.tensor([1.2, 1.2, 0.5])[:, None, None, None] + torch.tensor([-0.6, -0.6, 0.2])[:, None, None, None]
    inside = (((row - y) ** 2 + (column - x) ** 2) < radius**2)[..., None]
    ground = torch.rand(n, 1, 1, 3, generator=g) * (0.6 + 0.4 * row[None, :, :, None])
    return (255 * torch.where(inside, torch.rand(n, 1, 1, 3, generator=g), ground)).to(torch.uint8)


def real(part, most):
    "Pictures and labels of the CIFAR-10 in the data root, or None where there is no data root, or nothing that reads parquet."
    root = os.environ.get("SOFLOW_DATA")
    if not root or not importlib.util.find_spec("pyarrow") or not (files := sorted(Path(root).glob(f"cifar10/{part}-*.parquet"))):
        return None
    import pyarrow.parquet
    from PIL import Image

    rows = pyarrow.parquet.read_table(files[0]).slice(0, most).to_pydict()
    return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(img["bytes"]))) for img in rows["img"]])), torch.tensor(rows["label"])


class Pooled(nn.Module):
    "Cheap features: random filters, and their means over the picture."

    def __init__(self, count=8):
        super().__init__()
        self.filters = nn.Conv2d(3, count, 5, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x): return self.drop(self.filters(x).relu()).mean((2, 3))


# ------------------------------------------------------------------------------------------------ Fréchet distance
def by_sqrtm(a, b):
    from scipy.linalg import sqrtm

    return ((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()).item() - 2 * np.trace(sqrtm((a.cov @ b.cov).numpy()).real)


def test_frechet_of_gaussians_in_closed_form():
    diagonal = lambda mean, std: Moments(torch.tensor(mean).double(), torch.tensor(std).double().square().diag())
    assert frechet(diagonal([1.0, 2.0, 3.0], [1.0, 2.0, 0.0]), diagonal([0.0, 2.0, 5.0], [4.0, 2.0, 0.5])) == pytest.approx(1 + 4 + 9 + 0.25, abs=1e-10)
    # one covariance a rotation of the other, in the plane: tr of the root of A^1/2 B A^1/2 is sqrt(tr AB + 2 sqrt(det AB))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    a = torch.tensor([4.0, 1.0]).double().diag()
    b = turn @ a @ turn.T
    expected = 10 - 2 * ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt().item()
    zero = torch.zeros(2).double()
    assert frechet(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_frechet_agrees_with_scipy(d):
    a, b = moments(normal(3 * d + 20, d, 1) @ normal(d, d, 2)), moments(normal(2 * d + 20, d, 3, 0.7, 0.4))
    assert frechet(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert torch.allclose(a.cov, torch.as_tensor(np.cov((normal(3 * d + 20, d, 1) @ normal(d, d, 2)).numpy().T)).view(d, d))


def test_frechet_of_singular_covariances_stays_real():
    "Features that never fire have no variance; others copy each other."
    z = normal(200, 6, 1)
    a, b = torch.cat([z, z, torch.zeros(200, 3)], 1), torch.cat([2 * z, 2 * z, torch.zeros(200, 3)], 1)
    half = frechet(moments(z), moments(2 * z))
    assert frechet(a, b) == pytest.approx(2 * half, rel=1e-6) and frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_symmetry_and_invariance_under_orthogonal_maps():
    a, b, turn = normal(300, 10, 1), normal(250, 10, 2, 1.3, 0.2), torch.linalg.qr(normal(10, 10, 3))[0]
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9) == pytest.approx(frechet(a @ turn, b @ turn), rel=1e-9)
    assert mmd2(a, b).item() == pytest.approx(mmd2(b, a).item()) == pytest.approx(mmd2(a @ turn, b @ turn).item())
    assert frechet(a + 7, b + 7) == pytest.approx(frechet(a, b), rel=1e-9) and frechet(3 * a, 3 * b) == pytest.approx(9 * frechet(a, b), rel=1e-9)
    assert precision_recall(a, b, 3) == precision_recall(a @ turn, b @ turn, 3) == precision_recall(b, a, 3)[::-1]


def test_equal_sets_are_at_distance_zero():
    z = normal(400, 12, 1)
    assert frechet(z, z) == pytest.approx(0, abs=1e-9)
    assert frechet(z, z[torch.randperm(400, generator=torch.Generator().manual_seed(1))]) == pytest.approx(0, abs=1e-9)
    assert precision_recall(z, z, 3) == (1, 1)


@pytest.mark.parametrize("n,m", [(300, 300), (300, 900), (1200, 1200)])
def test_bias_of_frechet_is_the_predicted_one(n, m):
    stds = torch.linspace(0.3, 2, 10)
    found = np.mean([frechet(normal(n, 10, 2 * i) * stds, normal(m, 10, 2 * i + 1) * stds) for i in range(60)])
    assert found == pytest.approx(frechet_bias(stds.square().diag(), n, m), rel=0.1)
    assert frechet_bias(torch.eye(10), 100) == pytest.approx((10 + 10 * 11 / 4) / 100)


# ------------------------------------------------------------------------------------------------ kernel distance
def double_sum(a, b, ia, ib):
    "Over pairs of points drawn with repetition, without those that pair a point with itself."
    k = lambda x, y: (float(x @ y) / len(x) + 1) ** 3
    within = lambda x, index: np.mean([k(x[i], x[j]) for p, i in enumerate(index) for q, j in enumerate(index) if i != j])
    return within(a, ia) + within(b, ib) - 2 * np.mean([k(a[i], b[j]) for i in ia for j in ib])


def test_kernel_distance_is_the_double_sum():
    a, b = normal(9, 4, 1).numpy(), normal(7, 4, 2, 1.2, 0.3).numpy()
    assert mmd2(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(double_sum(a, b, range(9), range(7)))
    ia, ib = [0, 0, 3, 4, 4, 4, 7, 8, 1], [6, 6, 5, 0, 2, 2, 1]
    weights = lambda index, n: torch.tensor(np.bincount(index, minlength=n))[None]
    assert mmd2(torch.tensor(a), torch.tensor(b), weights(ia, 9), weights(ib, 7)).item() == pytest.approx(double_sum(a, b, ia, ib))


def test_kernel_distance_has_no_bias_at_any_size():
    for n in (10, 40, 160):
        values = torch.cat([mmd2(normal(n, 6, 2 * i), normal(n, 6, 2 * i + 1)) for i in range(150)])
        assert abs(values.mean()) < 3.5 * values.std() / 150**0.5 and (values < 0).any()
    # cubic kernel of N(mu, 1) and N(0, 1) in one dimension: the expectation over independent pairs is known
    mu, e = 0.5, lambda p, q: 1 + 3 * p * q + 3 * (p * p + 1) * (q * q + 1) + (p**3 + 3 * p) * (q**3 + 3 * q)
    values = torch.cat([mmd2(normal(400, 1, 2 * i, shift=mu), normal(400, 1, 2 * i + 1)) for i in range(40)])
    assert abs(values.mean() - (e(mu, mu) + e(0, 0) - 2 * e(mu, 0))) < 3.5 * values.std() / 40**0.5


def test_blocks_use_every_point_once_and_agree_with_the_whole():
    a, b = normal(700, 6, 1, shift=0.4), normal(450, 6, 2)
    assert kid(a, b, size=700).item() == pytest.approx(mmd2(a, b).item())
    assert kid(a, b, size=100).item() == pytest.approx(mmd2(a, b).item(), rel=0.3)
    assert kid(a, b, size=100).item() == kid(a, b, size=100).item() and len(kid(a, b, resamples=5)) == 6
    marked = a.clone()
    marked[650:] += 5                                                      # sets in order: no block may be left out
    assert kid(marked, b, size=100).item() > 1.5 * kid(a, b, size=100).item()
    assert kid(a[:5], b, size=10).isfinite().all()
    assert kid(a[:150], b[:150], size=100).item() != pytest.approx(mmd2(a[:150], b[:150]).item(), rel=1e-6)    # no block is larger than asked for


def test_agrees_with_torchmetrics():
    "It reads features through a module, here the identity."
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flat(nn.Module):
        num_features = 7

        def forward(self, x): return x.flatten(1)

    a, b = normal(120, 7, 1).float(), normal(90, 7, 2, 1.2, 0.3).float()
    fid, kernel = FrechetInceptionDistance(Flat(), input_img_size=(7, 1, 1)).set_dtype(torch.float64), KernelInceptionDistance(Flat(), subsets=1, subset_size=90)
    for metric in (fid, kernel):
        metric.update(a[:, :, None, None], real=False)
        metric.update(b[:, :, None, None], real=True)
    torch.manual_seed(0)
    kernel.fake_features, kernel.real_features = [a[:90]], [b]
    assert frechet(a, b) == pytest.approx(fid.compute().item(), rel=1e-4) and mmd2(a[:90], b).item() == pytest.approx(kernel.compute()[0].item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ reports
def test_every_metric_follows_growing_noise():
    data, other = rendered(600, 1), rendered(600, 2)
    net, noise = Pooled(), torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    reports = [evaluate_samples((other + level * noise).clamp(0, 255).to(torch.uint8), data, net, resamples=0).values for level in (0, 40, 120)]
    for name, sign in (("frechet", 1), ("kid", 1), ("precision", -1)):
        values = [sign * report[name] for report in reports]
        assert values == sorted(values) and values[2] > values[0], name


def test_report_says_what_was_done():
    data, net = rendered(300, 1), Pooled()
    report = evaluate_samples(rendered(200, 2), data, net, resamples=30, confidence=0.9, seed=3)
    assert (report.samples, report.data, report.features, set(report.values)) == (200, 300, 8, {"frechet", "kid", "precision", "recall"})
    assert all(s.low <= s.value <= s.high and s.error > 0 for s in report.scores.values()) and report.scores["kid"].bias is None
    assert "200 samples beside 300" in report.table and "90 % intervals of 30 resamples" in report.table and f"{report.values['frechet']:.4f}" in report.table
    again = evaluate_samples(rendered(200, 2), extract(data, net), net, resamples=30, confidence=0.9, seed=3)
    assert again.scores == report.scores and evaluate_samples(rendered(200, 2), data, net, resamples=30, confidence=0.9, seed=4).scores != report.scores
    wide = evaluate_samples(rendered(200, 2), data, net, resamples=30, confidence=0.99, seed=3)
    assert all(wide.scores[name].low <= s.low and s.high <= wide.scores[name].high for name, s in report.scores.items())
    none = evaluate_samples(rendered(200, 2), data, net, resamples=0, metrics="kid")
    assert none.scores["kid"].low is None and "-" in none.table and none.values == {"kid": pytest.approx(report.values["kid"])}


@pytest.mark.parametrize("other", [lambda n, s: normal(n, 8, s), lambda n, s: normal(n, 8, s, 1.2, 0.3), lambda n, s: normal(n, 8, s, 0.7, 0.1)], ids=["same", "wider", "narrower"])
def test_intervals_are_as_wide_as_chance(other):
    "Standard errors from one draw against the spread over fresh draws, and the bias that the bootstrap sees."
    draws = [evaluate_samples(other(250, 2 * i), normal(250, 8, 2 * i + 1), resamples=25, seed=i).scores for i in range(40)]
    for name in draws[0]:
        ratio = np.mean([d[name].error for d in draws]) / np.std([d[name].value for d in draws], ddof=1)
        assert 0.65 < ratio < 2.2, (name, ratio)
    truth, found = frechet(normal(200_000, 8, 1000), other(200_000, 1001)), [d["frechet"] for d in draws]
    assert np.mean([s.bias for s in found]) == pytest.approx(np.mean([s.value for s in found]) - truth, rel=0.4)
    assert np.mean([s.low - s.bias <= truth <= s.high - s.bias for s in found]) > 0.8


def test_interval_holds_the_middle_of_the_replicates():
    found = score(7.0, torch.arange(101.0), confidence=0.9, biased=True)
    assert (found.low, found.high, found.bias) == pytest.approx((7 - 45, 7 + 45, 43)) and found.error == pytest.approx(29.3, abs=0.01)
    within = score(7.0, torch.arange(101.0), least=0, most=10)
    assert (within.low, within.high, within.bias) == (0, 10, None)


def test_precision_and_recall_resample_halves_without_copies(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "precision_recall", lambda a, b, k: seen.append((a, b, k)) or precision_recall(a, b, k))
    metrics.precision_recall_score(normal(90, 4, 1), normal(60, 4, 2), Judging(resamples=3, k=2, most=80))
    assert sorted((len(a), len(b), k) for a, b, k in seen) == [(40, 30, 2)] * 3 + [(80, 60, 2)]
    assert all(len(x.unique(dim=0)) == len(x) for a, b, _ in seen for x in (a, b))


# ------------------------------------------------------------------------------------------------ pictures and features
def test_floats_and_levels_give_the_same_numbers():
    x = rendered(40, 1)
    floats, net = x.permute(0, 3, 1, 2) / 127.5 - 1, Pooled()
    for form in (x.numpy(), floats, floats.double().numpy(), iter([x[:7], x[7:]]), [floats[:30], floats[30:]]):
        assert extract(form, net, batch=9).equal(extract(x, net, batch=9)) or torch.allclose(extract(x, net), extract(form if not hasattr(form, "__next__") else x, net), atol=1e-6)
    assert torch.allclose(extract(x, net, batch=40), extract(x, net, batch=3), atol=1e-6)
    assert as_uint8((floats + 0.4 / 127.5).clamp(-1, 1)).equal(x)                # rounded, not cut


def test_extraction_leaves_the_module_alone_and_takes_batches():
    net, sizes = Pooled().train(), []
    net.register_forward_hook(lambda m, args, out: sizes.append((len(args[0]), m.training, out.requires_grad)))
    z = extract(rendered(10, 1), net, batch=4, device="cpu")
    assert net.training and sizes == [(4, False, False), (4, False, False), (2, False, False)] and z.dtype == torch.float32 and z.device.type == "cpu"
    seen = []
    extract((seen.append(i) or rendered(3, i) for i in range(3)), lambda x: (seen.append("f"), x.flatten(1))[1])
    assert seen == [0, "f", 1, "f", 2, "f"]                                      # one batch at a time
    assert extract(rendered(4, 1), lambda x: x.flatten(1)).min() >= -1


BAD = {
    "float in 0..1": (lambda x: x.permute(0, 3, 1, 2) / 255, "2 \\* x - 1"),
    "float in 0..255": (lambda x: x.permute(0, 3, 1, 2).float(), "give uint8"),
    "steps over the edge": (lambda x: x.permute(0, 3, 1, 2) / 127.5 - 1.1, "clamp"),
    "NaN": (lambda x: (x.permute(0, 3, 1, 2) / 127.5 - 1).where(torch.arange(32) != 5, torch.nan), "NaN or infinite"),
    "infinite": (lambda x: (x.permute(0, 3, 1, 2) / 127.5 - 1).where(torch.arange(32) != 5, torch.inf), "NaN or infinite"),
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


def test_other_bad_input_is_refused_in_words():
    x, net = rendered(60, 1), Pooled()
    cases = [((x, x, None), {}, "without features"), ((x, x, "resnet65"), {}, "Did you mean 'resnet56'"), ((x, x, 7), {}, "module or a function"),
             ((x, rendered(60, 1, 16), net), {}, "one size"), ((x[:8], x, net), {}, "covariance of 8 features"), ((x, x[:8], net), {}, "covariance of 8 features"),
             ((x, normal(60, 5, 1), net), {}, "8 features and the data 5"), ((x, x, net), {"metrics": "frechett"}, "Did you mean 'frechet'"),
             ((x, x, net), {"resample": 3}, "Did you mean 'resamples'"), ((x, x, net), {"resamples": -1}, "resamples"), ((x, x, net), {"resamples": 1}, "resamples"),
             ((x, x, net), {"confidence": 95}, "confidence"), ((x, x, net), {"k": 0}, "k is 0"), ((x, x, net), {"device": "gpu"}, "device"),
             ((x, x, lambda x: x), {}, r"\(60, D\)"), ((x, x, lambda x: x.mean((1, 2, 3))), {}, "expected"), ((x, x, lambda x: x.flatten(1) * torch.nan), {}, "NaN or infinite"),
             ((x[:7], x, net), {"metrics": "precision_recall"}, "at least 8"), ((x[:1], x, net), {"metrics": "kid"}, "at least two rows"),
             ((x[..., :1], x[..., :1], ResNet56()), {}, "colour")]
    for args, options, words in cases:
        with pytest.raises(InputError, match=words):
            evaluate_samples(*args, **options)
    with pytest.raises(InputError, match="4 and 5 features"):
        frechet(normal(60, 4, 1), normal(60, 5, 1))
    with pytest.raises(InputError, match="4 and 5 features"):
        kid(normal(60, 4, 1), normal(60, 5, 1))
    with pytest.raises(InputError, match="NaN or infinite"):
        frechet(normal(60, 4, 1) * torch.nan, normal(60, 4, 1))


# ------------------------------------------------------------------------------------------------ files
def test_files_for_other_evaluators(tmp_path):
    x = rendered(30, 1)
    path = write_npz(tmp_path / "deep" / "samples.npz", x.permute(0, 3, 1, 2) / 127.5 - 1)
    with np.load(path) as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8 and (file["arr_0"] == x.numpy()).all() and file["arr_0"].flags.c_contiguous
    write_npz(tmp_path / "parts.npz", (x[i:i + 7] for i in range(0, 30, 7)))
    assert read_npz(tmp_path / "parts.npz").equal(x) and read_npz(str(path)).equal(x)
    assert evaluate_samples(path, tmp_path / "parts.npz", Pooled(), resamples=0).values["frechet"] == pytest.approx(0, abs=1e-9)
    np.savez_compressed(tmp_path / "small.npz", arr_0=x.numpy(), arr_1=np.zeros(30))
    assert read_npz(tmp_path / "small.npz").equal(x)
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "parts.npz", "small.npz"} and [p.name for p in (tmp_path / "deep").iterdir()] == ["samples.npz"]


def test_a_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    x = rendered(5, 1)
    path = write_npz(tmp_path / "a.npz", x)
    def full(*args, **arrays): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError):
        write_npz(path, rendered(9, 2))
    assert read_npz(path).equal(x) and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_damaged_files_are_refused_in_words(tmp_path):
    whole = write_npz(tmp_path / "a.npz", rendered(20, 1)).read_bytes()
    bad = tmp_path / "b.npz"
    def refused(content, words):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_npz(bad)
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        refused(whole[:cut], "not a whole .npz")
    for place in (150, len(whole) // 2, len(whole) - 300):
        refused(whole[:place] + bytes(255 - byte for byte in whole[place:place + 4]) + whole[place + 4:], "damaged")
    refused(b"\x80\x04" + bytes(200), "not a whole .npz")
    for arrays, words in (({"samples": np.zeros((2, 4, 4, 3), np.uint8)}, "lacks arr_0"), ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "Permute|uint8"), ({"arr_0": np.zeros((2, 3, 4, 4), np.float32) - 1}, "uint8"),
                          ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "Permute"), ({"arr_0": np.array([{}, {}], dtype=object)}, "objects"), ({}, "nothing")):
        np.savez(bad, **arrays)
        with pytest.raises(InputError, match=words):
            read_npz(bad)
    with pytest.raises(InputError, match="folder"):
        read_npz(tmp_path)
    for name, pictures, words in (("a.png", rendered(2, 1), "end in .npz"), ("c.npz", [], "No pictures"), ("c.npz", [rendered(2, 1), rendered(2, 1, 16)], "different sizes")):
        with pytest.raises(InputError, match=words):
            write_npz(tmp_path / name, pictures)
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(InputError, match="folder"):
        write_npz(tmp_path / "d.npz", rendered(2, 1))
    assert not (tmp_path / "c.npz").exists()


# ------------------------------------------------------------------------------------------------ networks
def by_hand(weights, x):
    "The 64 features of a ResNet-56, stated once more without modules."
    f = nn.functional
    norm = lambda x, name: f.batch_norm(x, *(weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")), eps=1e-5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = norm(f.conv2d(((x / 255 - mean) / std).permute(0, 3, 1, 2), weights["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(9):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(f.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            y = norm(f.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).relu()
    return x.mean((2, 3))


def some_weights(tmp_path):
    "The real weights where there is a data root, else random ones, with statistics that are not trivial."
    path = Path(os.environ.get("SOFLOW_DATA", "")) / "cifar_resnet56" / "resnet56.npz"
    if os.environ.get("SOFLOW_DATA") and path.is_file():
        return path
    torch.manual_seed(0)
    weights = {name: tensor for name, tensor in ResNet56().state_dict().items() if "num_batches" not in name}
    weights = {name: tensor + 0.2 * torch.rand_like(tensor) if "bn" in name else tensor for name, tensor in weights.items()}
    np.savez(tmp_path / "weights.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    return tmp_path / "weights.npz"


def test_resnet56_is_the_network_of_its_weights(tmp_path):
    path, x = some_weights(tmp_path), rendered(12, 1)
    net = resnet56(path)
    weights = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    with torch.no_grad():
        expected = by_hand(weights, x)
    assert not net.training and not any(p.requires_grad for p in net.parameters()) and sum(p.numel() for p in net.parameters()) == 853_018
    torch.testing.assert_close(extract(x, net), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.logits(x.permute(0, 3, 1, 2) / 127.5 - 1), expected @ weights["linear.weight"].T + weights["linear.bias"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(extract(x, {"name": "resnet56", "path": str(path)}, device="cpu"), expected, rtol=1e-4, atol=1e-4)


def test_resnet56_refuses_other_weights(tmp_path, monkeypatch):
    arrays = read_arrays(some_weights(tmp_path))
    path = tmp_path / "other.npz"
    for change, words in (({"linear.bias": np.zeros(11, np.float32)}, "1 tensors .* 'linear.bias'"), ({"extra": np.zeros(1)}, "'extra'")):
        np.savez(path, **arrays | change)
        with pytest.raises(InputError, match=words):
            resnet56(path)
    np.savez(path, **{name: array for name, array in arrays.items() if name != "conv1.weight"})
    with pytest.raises(InputError, match="'conv1.weight'"):
        resnet56(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole"):
        resnet56(path)
    monkeypatch.setenv("SOFLOW_DATA", str(tmp_path))
    with pytest.raises(InputError, match="SOFLOW_DATA"):
        build("features", "resnet56")


def test_classifier_and_numbers_of_the_data_root(tmp_path):
    "Real CIFAR-10 where it can be read: 93.4 % and the distances of its README at 2,000 pictures. Else the order of distances on rendered pictures."
    found, path = real("test", 2000), some_weights(tmp_path)
    net = resnet56(path)
    data, more = (rendered(200, 1), rendered(200, 2)) if found is None else (found[0], real("train", 2000)[0])
    z = extract(data, net)
    if found is not None:
        labels = found[1]
        assert (net.linear(z).argmax(1) == labels).double().mean().item() == pytest.approx(0.934, abs=0.0125)   # two standard errors at 2,000
        assert frechet(z[labels == 3], z) == pytest.approx(40, rel=0.35)
    noise = torch.randn(more.shape, generator=torch.Generator().manual_seed(0))
    spoilt = [frechet(extract((more + level * noise).round().clamp(0, 255).to(torch.uint8), net), z) for level in (0, 8, 64)]
    print(found is not None, spoilt)
    assert spoilt[0] < spoilt[1] < spoilt[2]
    if found is not None:
        assert spoilt == [pytest.approx(0.15, abs=0.08), pytest.approx(4.4, rel=0.2), pytest.approx(58.6, rel=0.1)]


def test_inception_by_a_stand_in(monkeypatch):
    "What torch-fidelity is handed: uint8 pictures with channels first, and the names of the published features."
    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features_list, **options):
            super().__init__()
            assert (name, features_list, options) == ("inception-v3-compat", ["2048"], {})
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 32, 32)
            return (x.float().flatten(1)[:, :2048] * self.scale,)

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    x = rendered(5, 1)
    assert extract(x, "inception", device="cpu").equal(x.permute(0, 3, 1, 2).flatten(1)[:, :2048].float())
    with pytest.raises(InputError, match="colour"):
        extract(x[..., :1], "inception", device="cpu")
    def offline(*args): raise OSError("no network")
    module.FeatureExtractorInceptionV3 = offline
    with pytest.raises(InputError, match="no network"):
        Inception()


@pytest.mark.parametrize("broken", [None, RuntimeError("operator torchvision::nms does not exist")], ids=["missing", "torchvision"])
def test_inception_is_missed_in_words(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    if broken:
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name.startswith("torch_fidelity"):
                    raise broken
        monkeypatch.delitem(sys.modules, "torch_fidelity")
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(InputError, match="pip install soflow_edu\\[inception\\]"):
        evaluate_samples(rendered(4, 1), rendered(4, 2), "inception")
