"""CIFAR-10: tables with faults, sources, stored weights, and the recipes.

And augmentation against other implementations."""

import importlib.util
import io
import json
import math
import os
import sys
import types
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image

from faults import within
from helpers import complaint
from readers import UNET as SMALL
from soflow_edu import cifar10 as chapter
from soflow_edu.cifar10 import (
    CLASSES,
    SCENES,
    AugmentedPictures,
    RandomFilters,
    Warps,
    augment,
    cifar10,
    doubling,
    draw_warps,
    export_weights,
    load_weights,
    read_card,
    read_table,
    render,
    rendered_table,
    warp,
)
from soflow_edu.comparing import compare
from soflow_edu.config import Config, load_config, make_config, read_yaml
from soflow_edu.core import InputError, build
from soflow_edu.digits import Pictures
from soflow_edu.metrics import evaluate_samples, resnet56
from soflow_edu.odes import OdeFlow
from soflow_edu.training import assemble, begin, finish, save_run, train
from soflow_edu.unet import UNet

SHARED = os.environ.get("SOFLOW_DATA", "")  # the data root, if there is one


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def png(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def refused(call, *args, **options):
    "The message as it is, in one line."
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    return str(caught.value)


def has_photographs(root):
    return bool(root) and any((Path(root) / "cifar10").glob("*.parquet"))


@pytest.fixture(scope="module")
def table():
    return rendered_table(60, seed=5)


def changed(table, row, **columns):
    "The table with other entries in one row."
    new = {name: list(values) for name, values in table.items()}
    for name, value in columns.items():
        new[name][row] = value
    return new


# ------------------------------------------------------------------ scenes and tables
def test_scenes_repeat_and_differ():
    labels = torch.arange(400) % 10
    a = render(labels, generator(1))
    assert a.dtype == torch.uint8
    assert a.shape == (400, 32, 32, 3)
    assert a.equal(render(labels, generator(1)))
    assert not a.equal(render(labels, generator(2)))
    assert len(a.flatten(1).unique(dim=0)) == 400


def test_no_two_classes_or_pictures_look_the_same():
    labels = torch.arange(400) % 10
    a = render(labels, generator(1)).double()
    means = torch.stack([a[labels == k].mean(0) for k in range(10)])
    assert torch.pdist(means.flatten(1)).min() > 150
    boats = a[labels == 3].flatten(1)
    assert torch.cdist(boats, boats).fill_diagonal_(math.inf).min() > 1000


def coarse(x):
    return torch.nn.functional.avg_pool2d(x.abs(), 4).flatten(1)


def test_scenes_can_be_told_apart():
    """The classes are real.

    A linear reader of coarse pictures finds them much more often than chance."""
    from sklearn.linear_model import LogisticRegression

    law = cifar10("rendered", count=1500)
    reader = LogisticRegression(max_iter=300).fit(coarse(law.points), law.labels)
    assert reader.score(coarse(law.test), law.test_labels) > 0.35


def test_table_has_the_columns_of_the_hub(table):
    assert list(table) == ["img", "label"]
    assert set(table["img"][0]) == {"bytes", "path"}
    assert table["label"][:11] == [*range(10), 0]
    picture = Image.open(io.BytesIO(table["img"][3]["bytes"]))
    assert np.asarray(picture).shape == (32, 32, 3)
    pictures, labels = read_table(table)
    assert pictures.equal(render(labels, generator(5)))
    assert labels.tolist() == table["label"]


def cut(content):
    return content[: len(content) // 2]


def head_only(content):
    return content[:30]


def emptied(content):
    return b""


def no_picture(content):
    return b"GIF89a"


def one_bit(content):
    return content[:300] + bytes([content[300] ^ 4]) + content[301:]


SPOILERS = [cut, head_only, emptied, no_picture, one_bit]


def spoilt(table, spoil):
    "The table with two broken files, one of them without a path."
    seven = spoil(table["img"][7]["bytes"])
    nine = spoil(table["img"][9]["bytes"])
    bad = changed(table, 7, img={"bytes": seven, "path": "seven.png"})
    return changed(bad, 9, img={"bytes": nine, "path": None})


@pytest.mark.parametrize("spoil", SPOILERS)
def test_broken_files_are_named_and_counted(table, spoil):
    words = refused(read_table, spoilt(table, spoil), "train.parquet")
    assert "2 of 60" in words
    assert "train.parquet" in words
    assert "row 7 (seven.png)" in words
    assert "row 9 (no path)" in words
    assert "skip_broken=True" in words
    assert "0x" not in words


@pytest.mark.parametrize("spoil", SPOILERS)
def test_broken_files_are_skipped_only_when_asked(table, spoil, capsys):
    bad = spoilt(table, spoil)
    pictures, labels = read_table(bad, "train.parquet", skip_broken=True)
    assert "without 2 of 60" in capsys.readouterr().out
    assert len(pictures) == 58
    keep = [row for row in range(60) if row not in (7, 9)]
    whole, all_labels = read_table(table)
    assert pictures.equal(whole[keep])
    assert labels.equal(all_labels[keep])


def test_only_three_broken_rows_are_listed(table):
    images = [{"bytes": b"x", "path": f"{k}.png"} for k in range(60)]
    bad = {"img": images, "label": table["label"]}
    words = refused(read_table, bad, skip_broken=True)
    assert "60 of 60" in words
    assert "row 2" in words
    assert "row 3" not in words


def test_an_empty_table_is_refused():
    assert "empty" in refused(read_table, {"img": [], "label": []})


@pytest.mark.parametrize(
    "img", [None, {"path": "elsewhere.png", "bytes": None}, {}, "name.png"]
)
def test_an_entry_without_bytes_is_broken(table, img):
    words = refused(read_table, changed(table, 4, img=img))
    assert "row 4" in words
    assert "no bytes" in words


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((28, 28, 3), np.uint8),
        np.zeros((32, 31, 3), np.uint8),
        np.zeros((32, 32), np.uint16),
    ],
    ids=["grey", "transparent", "small", "narrow", "deep"],
)
def test_pictures_of_another_kind_are_refused_even_when_skipping(table, array):
    bad = changed(table, 11, img={"bytes": png(array), "path": "odd.png"})
    for skip in (False, True):
        words = refused(read_table, bad, "t", skip_broken=skip)
        assert "row 11 (odd.png)" in words
        assert "1 of 60" in words
        assert " x ".join(map(str, array.shape)) in words


@pytest.mark.parametrize("label", [-1, 10, None, 3.0, "cat", True])
def test_labels_out_of_range_are_refused(table, label):
    words = refused(read_table, changed(table, 2, label=label), skip_broken=True)
    assert f"row 2 has {label!r}" in words
    assert "0 to 9" in words


def test_missing_columns(table):
    other = {"image": table["img"], "label": table["label"]}
    words = refused(read_table, other, "here")
    assert "here has the columns image, label" in words
    assert "lacks img" in words
    assert "lacks img, label" in refused(read_table, {})


# ---------------------------------------------------------------------------- sources
SWITCHES = ("datasets.config", "huggingface_hub.constants")  # hold HF_HUB_OFFLINE


class Rows:
    "What the reader needs of a data set of the library datasets."

    def __init__(self, table):
        self.table = table
        self.features = None
        self.column_names = list(table)

    def __iter__(self):
        for row in zip(*self.table.values(), strict=True):
            yield dict(zip(self.table, row, strict=True))


class Pretence:
    "A library datasets that gives our tables; what it is asked for is noted."

    def __init__(self, table):
        self.table = table
        self.asked = []
        self.hub_answers = True
        names = ("datasets", "huggingface_hub", *SWITCHES)
        self.modules = {name: types.ModuleType(name) for name in names}
        for name in SWITCHES:
            self.modules[name].HF_HUB_OFFLINE = False
        self.modules["datasets"].load_dataset = self.load_dataset
        self.modules["datasets"].Image = type("Image", (), {})
        self.modules["huggingface_hub"].HfApi = self.api

    def api(self):
        return self

    def load_dataset(self, name, **options):
        self.asked.append((name, options))
        files = [Path(file) for file in options.get("data_files", [])]
        if any(file.stat().st_size == 0 for file in files):
            raise ValueError("Couldn't read the footer")
        if name == chapter.HUB and not self.hub_answers:
            raise ConnectionError("no network")
        return Rows(self.table)

    def dataset_info(self, name, timeout):
        assert timeout <= 5
        if not self.hub_answers:
            raise OSError("no route")

    def offline(self):
        return [self.modules[name].HF_HUB_OFFLINE for name in SWITCHES]


@pytest.fixture
def pretend(monkeypatch, table):
    pretence = Pretence(table)
    for name, module in pretence.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return pretence


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFLOW_DATA", str(tmp_path))
    return tmp_path


def fill(folder):
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / f"{part}-00000-of-00001.parquet").write_bytes(b"PAR1")
    return folder


def test_rendered_is_a_law_with_held_out_pictures():
    given = {"name": "cifar10", "source": "rendered", "count": 50}
    law = build("pictures", given)
    assert isinstance(law, Pictures)
    assert isinstance(law, AugmentedPictures)
    assert law.points.shape == (50, 3, 32, 32)
    assert law.points.dtype == torch.float32
    assert len(law.test) == 1000
    assert law.names == tuple(SCENES)
    assert law.classes == 10
    assert law.features == "random_filters"
    assert "rendered" in law.name


def test_rendered_points_are_others_than_those_held_out():
    law = cifar10("rendered", count=50)
    assert law.points.min() >= -1
    assert law.points.max() <= 1
    assert torch.cdist(law.test.flatten(1), law.points.flatten(1)).min() >= 1
    assert cifar10("rendered", count=50).points.equal(law.points)


def test_auto_takes_the_data_root_first(root, pretend, capsys):
    fill(root / "cifar10")
    law = cifar10()
    assert law.name == "cifar10"
    assert law.names == CLASSES
    assert law.features == "resnet56"
    assert not capsys.readouterr().out
    assert [name for name, _ in pretend.asked] == ["parquet", "parquet"]
    assert all(options["streaming"] for _, options in pretend.asked)
    expected = str(root / "cifar10/train-00000-of-00001.parquet")
    assert pretend.asked[0][1]["data_files"] == [expected]


def test_auto_goes_on_to_the_hub(root, pretend):
    assert cifar10().name == "cifar10"
    assert [name for name, _ in pretend.asked] == [chapter.HUB] * 2


def test_auto_draws_when_the_hub_is_silent(root, pretend, capsys):
    pretend.hub_answers = False
    law = cifar10(count=30)
    words = capsys.readouterr().out
    assert law.name == "rendered scenes"
    assert "rendered scenes, not photographs" in words
    assert chapter.HUB in words
    assert pretend.offline() == [False, False]  # put back
    assert "could not be had" in refused(cifar10, "hub")


def test_the_hub_is_not_waited_for(pretend):
    pretend.hub_answers = False
    with chapter.hub_or_cache():
        assert pretend.offline() == [True, True]


def test_a_damaged_root_is_never_replaced_in_silence(root, pretend):
    folder = fill(root / "cifar10")
    damaged = folder / "test-00000-of-00001.parquet"
    damaged.write_bytes(b"")
    for source in ("auto", "root", folder):
        words = refused(cifar10, source)
        assert "test-00000-of-00001.parquet" in words
        assert "cannot be read as parquet" in words
    damaged.unlink()
    for source in ("auto", "root"):
        assert "lacks test-*.parquet" in refused(cifar10, source)


def test_a_missing_root_says_what_to_do(root, pretend):
    words = refused(cifar10, "root")
    assert "is no folder" in words
    assert "SOFLOW_DATA" in words


@pytest.mark.parametrize("source", ["root", "auto", "hub"])
def test_a_missing_library_says_what_to_do(root, pretend, monkeypatch, source):
    fill(root / "cifar10")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install" in refused(cifar10, source)


def test_count_is_of_training_pictures(root, pretend):
    fill(root / "cifar10")
    law = cifar10("root", count=25)
    assert len(law.points) == 25
    assert len(law.test) == 60


def test_broken_files_of_the_root_are_skipped(root, pretend, table):
    fill(root / "cifar10")
    pretend.table = changed(table, 0, img={"bytes": b"broken", "path": None})
    assert "the train table" in refused(cifar10, "root")
    assert len(cifar10("root", skip_broken=True).points) == 59


@pytest.mark.parametrize(
    "options, word",
    [
        ({"source": "rot"}, "Did you mean 'root'"),
        ({"augment": 1.5}, "probability"),
        ({"augment": "yes"}, "probability"),
        ({"count": 0}, "at least 1"),
        ({"count": 2.5}, "whole number"),
        ({"source": "no/such/folder"}, "no folder"),
    ],
)
def test_bad_options(options, word):
    assert word in refused(cifar10, **options)


def test_misspelt_option():
    wrong = {"name": "cifar10", "augmnt": 0.12}
    assert "augment" in refused(build, "pictures", wrong)


def write_parquet(folder, table):
    "Written by the library itself: pictures as its Image type, and as plain bytes."
    import datasets

    kinds = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    for part, features in (("train", kinds), ("test", None)):
        rows = datasets.Dataset.from_dict(table, features=features)
        rows.to_parquet(folder / f"{part}-00000-of-00001.parquet")


def test_real_parquet_files(tmp_path, table):
    if not importlib.util.find_spec("datasets"):  # an extra
        for part in ("train", "test"):
            (tmp_path / f"{part}-0.parquet").touch()
        assert "pip install" in refused(cifar10, tmp_path)
        return
    write_parquet(tmp_path, table)
    law = cifar10(tmp_path)
    expected = read_table(table)[0].permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(law.points, expected)
    torch.testing.assert_close(law.test, expected)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read as parquet" in refused(cifar10, tmp_path)


def test_the_data_root_of_this_machine():
    "Only where there is one; elsewhere the same reader is tested on rendered tables."
    if not has_photographs(SHARED):
        return
    law = cifar10("root", count=500)
    assert len(law.points) == 500
    assert law.names == CLASSES
    assert sorted(law.test_labels.unique().tolist()) == list(range(10))
    assert 0.2 < law.points.std() < 0.8
    assert law.points.aminmax() == (-1, 1)


# ----------------------------------------------------------------------- augmentation
def only(n, **given):
    zero = torch.zeros(n)
    nothing = {
        "mirror": zero > 0,
        "scale": zero,
        "squeeze": zero,
        "angle": zero,
        "shift": torch.zeros(n, 2),
    }
    return Warps(**nothing | given)


@pytest.fixture(scope="module")
def x():
    return render(torch.arange(30) % 10, generator(9)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def smooth(x):
    return torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, 1.5, 1.5)))


N = 200_000
P = 0.12


@pytest.fixture(scope="module")
def drawn():
    return draw_warps(N, P, generator(3))


def fits(values, law, *options):
    "Whether values may come from a law, by Kolmogorov and Smirnov."
    return scipy.stats.kstest(values.double().numpy(), law, *options).pvalue > 1e-4


def test_labels_have_the_published_frequencies(drawn):
    labels = drawn.labels.double()
    share = (labels != 0).double().mean(0).tolist()
    for value, expected in zip(share, (0.5, P, P, P / 2, P, P), strict=True):
        assert abs(value - expected) < 5 * (expected * (1 - expected) / N) ** 0.5
    assert set(labels[:, 0].tolist()) == {0.0, 1.0}
    assert ((labels[:, 4] != 0) == (labels[:, 5] != 0)).all()


def test_labels_have_the_published_laws(drawn):
    labels = drawn.labels.double()
    for k in (1, 4, 5):
        assert fits(labels[labels[:, k] != 0, k], "norm")
    lengths = labels[:, 2:4].norm(dim=1)
    assert fits(lengths[lengths > 0], "halfnorm")
    turned = labels[labels[:, 3] != 0]
    around = (-math.pi, 2 * math.pi)
    assert fits(torch.atan2(turned[:, 3], turned[:, 2]), "uniform", around)
    angle = drawn.angle
    assert fits(angle[angle != 0], "uniform", around)
    assert abs((angle == 0).double().mean() - 0.5) < 0.01


def test_transformations_are_independent(drawn):
    happens = (drawn.labels[:, [1, 2, 4, 0]] != 0).double().T
    assert (torch.corrcoef(happens) - torch.eye(4)).abs().max() < 5 / N**0.5


@pytest.fixture(scope="module")
def warps():
    return draw_warps(5000, 0.6, generator(4))


def test_labels_give_the_matrix(warps):
    "Without the turned half of the squeezes, by formulas written out again."
    plain = warps.angle == 0
    labels = warps.labels.double()[plain][:500]
    matrix = warps.matrix.double()[plain][:500]
    for row, m in zip(labels, matrix, strict=True):
        wide = 2 ** (0.2 * (row[1] + row[2]))
        high = 2 ** (0.2 * (row[1] - row[2]))
        expected = np.diag([wide, high])
        np.testing.assert_allclose(m[:, :2], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m[:, 2], row[4:] / 4, rtol=1e-5, atol=1e-7)


def test_a_turned_squeeze_by_its_angle(warps):
    matrix = warps.matrix.double()
    for i in (warps.angle != 0).nonzero()[:500, 0].tolist():
        r = float(warps.angle[i])
        a = 2 ** (0.2 * float(warps.squeeze[i]))
        scale = 2 ** (0.2 * float(warps.scale[i]))
        turn = np.array([[math.cos(r), -math.sin(r)], [math.sin(r), math.cos(r)]])
        expected = scale * turn @ np.diag([a, 1 / a]) @ np.linalg.inv(turn)
        np.testing.assert_allclose(matrix[i, :, :2], expected, rtol=1e-4, atol=1e-5)


def test_a_squeeze_keeps_areas(warps):
    area = torch.linalg.det(warps.matrix.double()[:, :, :2])
    expected = torch.exp2(0.4 * warps.labels.double()[:, 1])
    torch.testing.assert_close(area, expected, rtol=1e-4, atol=1e-5)


def mirrored(x, labels):
    "The pictures, those mirrored that the labels name."
    return torch.where(labels[:, 0].bool()[:, None, None, None], x.flip(3), x)


def test_no_augmentation_but_mirrors_at_p_zero(x):
    y, labels = augment(x, 0.0, generator(5))
    assert (labels[:, 1:] == 0).all()
    assert 0 < labels[:, 0].sum() < len(x)
    assert y.equal(mirrored(x, labels))


def test_unwarped_rows_are_bit_identical_and_all_is_reproducible(x):
    y, labels = augment(x, 0.3, generator(6))
    again, same = augment(x.clone(), 0.3, generator(6))
    assert y.equal(again)
    assert labels.equal(same)
    still = (labels[:, 1:] == 0).all(1)
    assert 0 < still.sum() < len(x)
    change = (y - mirrored(x, labels)).abs().flatten(1).amax(1)
    assert (change[still] == 0).all()
    assert (change[~still] > 0.01).all()


def test_the_picture_given_is_not_changed(x):
    before = x.clone()
    augment(x, 1.0, generator(7))
    assert x.equal(before)


def test_doubling_and_halving_undo_one_another(x):
    double, halve = doubling(32)
    torch.testing.assert_close(halve @ double, torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(double.sum(1), torch.ones(64))
    same = chapter.resample(x, only(len(x)).matrix)
    torch.testing.assert_close(same, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("right, down", [(3, 0), (0, -2), (-4, 5)])
def test_whole_pixel_shifts_are_rolls(x, right, down):
    """One pixel is a quarter of w, since the shift is w / 8 of 32 pixels.

    w_x points right and w_y down."""
    shift = torch.tensor([right / 4, down / 4]).expand(len(x), 2)
    gap = warp(x, only(len(x), shift=shift)) - x.roll((down, right), (2, 3))
    assert gap[:, :, 8:-8, 8:-8].abs().max() < 1e-3


def by_scipy(x, matrix):  # (C, n, n), (2, 3)
    swap = matrix.flip(0)[:, [1, 0, 2]].double().numpy()
    back = np.linalg.inv(swap[:, :2])
    centre = np.full(2, (x.shape[1] - 1) / 2)
    offset = centre - back @ (centre + x.shape[1] / 2 * swap[:, 2])
    moved = [
        scipy.ndimage.affine_transform(c, back, offset, order=3, mode="reflect")
        for c in x.double().numpy()
    ]
    return torch.from_numpy(np.stack(moved))


AROUND = torch.linspace(-3, 3, 30)
GIVEN = {
    "scale": {"scale": torch.linspace(-2.5, 2.5, 30)},
    "squeeze": {"squeeze": torch.linspace(-2, 2, 30)},
    "turned squeeze": {"squeeze": torch.full((30,), 1.5), "angle": AROUND},
    "shift": {"shift": torch.linspace(-2, 2, 60).view(30, 2)},
    "all": {
        "scale": torch.linspace(-1, 1, 30),
        "squeeze": torch.full((30,), -1.0),
        "angle": AROUND,
        "shift": torch.linspace(-1, 1, 60).view(30, 2),
    },
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
def test_warps_beside_scipy(smooth, given):
    warps = only(30, **given)
    pairs = zip(smooth, warps.matrix, strict=True)
    expected = torch.stack([by_scipy(*pair) for pair in pairs]).clamp(-1, 1)
    gap = (warp(smooth, warps) - expected).abs()
    assert gap.mean() < 2e-3
    assert gap.max() < 0.06


def test_enlarging_beside_pillow(smooth):
    "Twice as large (w = 5) is Pillow's own resize of the middle."
    big = warp(smooth[:3], only(3, scale=torch.full((3,), 5.0)))
    for picture, ours in zip(smooth[:3], big, strict=True):
        channel = Image.fromarray(picture[0].numpy())
        theirs = np.asarray(channel.resize((64, 64), Image.Resampling.BICUBIC))
        assert np.abs(theirs[16:48, 16:48] - ours[0].numpy()).max() < 0.04


def test_shrinking_does_not_alias():
    "Stripes finer than the shrunk grid must fade and not turn into broad ones."
    stripes = torch.cos(math.pi * 0.9 * torch.arange(32.0)).expand(1, 1, 32, 32)
    shrunk = warp(stripes, only(1, scale=torch.tensor([-3.0])))
    assert shrunk[0, 0, 12:20, 8:24].abs().mean() < 0.5 * stripes.abs().mean()


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (3, 8, 8)])
def test_only_squares_are_augmented(shape):
    assert "squares" in refused(augment, torch.zeros(shape), 0.1, generator())


@pytest.mark.parametrize("p", [1.2, -0.1])
def test_a_probability_is_between_0_and_1(p):
    assert "between 0 and 1" in refused(draw_warps, 4, p, generator())


# -------------------------------------------------------- samples, training, judging
def among(x, points):  # (B, ...), (N, ...) -> (B,)
    "Which pictures are points of a set."
    gaps = torch.cdist(x.flatten(1).double(), points.flatten(1).double())
    return (gaps < 1e-3).any(1)


def test_plain_samples_are_points():
    law = cifar10("rendered", count=40)
    x, y = law.sample(64, generator(1))
    assert x.shape == (64, 3, 32, 32)
    assert among(x, law.points).all()


def test_flipped_samples_carry_no_labels():
    law = cifar10("rendered", count=40, flip=True)
    x, y = law.sample(64, generator(1))
    straight = among(x, law.points)
    flipped = among(x, law.points.flip(3))
    assert (straight | flipped).all()
    assert 10 < flipped.sum() < 54


def test_augmented_samples_carry_labels():
    law = cifar10("rendered", count=40, augment=0.5)
    x, y, extras = law.sample(64, generator(1))
    assert list(extras) == ["augment"]
    assert extras["augment"].shape == (64, 6)
    still = (extras["augment"][:, 1:] == 0).all(1)
    assert 0 < still.sum() < 40
    both = torch.cat([law.points, law.points.flip(3)])
    assert among(x[still], both).all()
    assert law.points.equal(cifar10("rendered", count=40).points)
    assert law.sample(64, generator(1))[0].equal(x)


@pytest.mark.parametrize("p", [0.5, 0.0])
def test_the_network_is_told(p):
    """A training on augmented pictures moves the weights that read the labels.

    Without augmentation they stay."""
    law = cifar10("rendered", count=40, augment=p)
    network = SMALL | {"augment": 6}
    config = Config(network=network, steps=2, batch=16, learning_rate=1e-2, warmup=1)
    model, objective = assemble(config)
    before = model.net.map_augment.weight.detach().clone()
    finish(train(model, objective, law, config))
    assert model.net.map_augment.weight.equal(before) == (p == 0.0)


def test_random_filters_see_faults():
    judge = RandomFilters()
    assert RandomFilters().second.weight.equal(judge.second.weight)
    assert not RandomFilters(1).second.weight.equal(judge.second.weight)
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert "colour" in refused(judge, torch.zeros(2, 1, 32, 32))
    assert not any(p.requires_grad for p in judge.parameters())


class Plain:
    "The velocity x, and a map that stays where it is."

    path = build("path", "linear")

    def velocity(self, x, t, y=None):
        return x

    def solution(self, x, t, s, y=None):
        return x


class Shifted(Plain):
    "One-step pictures differ from the ODE's by a known amount in the left half."

    def solution(self, x, t, s, y=None):
        time = torch.as_tensor(s - t, dtype=x.dtype)
        end = x * torch.exp(time).reshape(-1, 1, 1, 1)
        end[..., :2] += 0.3
        return end


def test_distance_maps():
    x1 = torch.randn(12, 3, 4, 4, generator=generator()).double()
    flow = OdeFlow(Shifted(), 1e-8)
    report = compare(Shifted(), flow, x1, metrics=("one_step", "distance_maps"))
    maps = report.results["distance_maps"]
    expected = torch.zeros(10, 4, 4).double()
    expected[:, :, :2] = 0.3
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    each = report.results["distance_of_each"]
    np.testing.assert_allclose(each, 0.3 / 2**0.5, atol=1e-5)
    assert chapter.show_distances(report).axes
    assert "distance_maps" not in report.values


def test_distance_maps_need_pictures():
    points = torch.randn(4, 2)
    flow = OdeFlow(Plain(), 1e-5)
    words = refused(compare, Plain(), flow, points, metrics="distance_maps")
    assert "need pictures" in words


# --------------------------------------------------------------- weights and recipes
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The folder of a run, and the run."
    folder = tmp_path_factory.mktemp("run")
    data = {"name": "cifar10", "source": "rendered"}
    config = Config(network=SMALL, steps=2, batch=4, data=data, seed=11)
    model, objective = assemble(config)
    step = finish(train(model, objective, cifar10("rendered", count=10), config))
    return save_run(folder / "run", step.run), step.run


def test_the_card_says_where_weights_come_from(run, tmp_path):
    path = tmp_path / "deep" / "small.safetensors"
    facts = {"hardware": "two cores"}
    assert export_weights(run[0], path, "soflow train x", facts) == path
    card = read_card(path)
    assert card["seed"] == 11
    assert card["step"] == 2
    assert card["command"] == "soflow train x"
    assert card["hardware"] == "two cores"
    assert card["bytes"] == path.stat().st_size
    assert "source: rendered" in card["config"]


def test_weights_go_and_come_back(run, tmp_path):
    folder, given = run
    model = load_weights(export_weights(folder, tmp_path / "small.safetensors"))
    assert not model.training
    for p in model.parameters():
        assert p.dtype == torch.float32
        assert not p.requires_grad
    for name, value in model.state_dict().items():
        expected = given.ema[name].half().float()
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    x = torch.randn(2, 3, 32, 32, generator=generator())
    assert (model(x, 1.0, 0.0) - x).abs().max() > 0


def test_named_weights_are_found_in_the_data_root(run, root):
    export_weights(run[0], root / "runs" / "mine.safetensors")
    assert load_weights("mine").spec() == run[1].model.spec()
    words = refused(load_weights, "mine2")
    assert "mine2.safetensors was not found" in words
    assert str(root) not in words


def test_damaged_weights_are_refused(run, tmp_path):
    path = export_weights(run[0], tmp_path / "w.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "checksum" in refused(load_weights, path)
    path.write_bytes(content)
    assert load_weights(path)


def test_damaged_cards_are_refused(run, tmp_path):
    path = export_weights(run[0], tmp_path / "w.safetensors")
    card = path.with_suffix(".json")
    text = card.read_text()
    faults = {text[:-5]: "damaged", "{}": "no card", "[]": "no card"}
    for wrong, word in faults.items():
        card.write_text(wrong)
        assert word in refused(load_weights, path)
    card.unlink()
    assert "missing" in refused(load_weights, path)
    other = json.loads(text)
    other["model"]["network"] = SMALL | {"width": 12}
    card.write_text(json.dumps(other))
    assert "is damaged: its model" in refused(load_weights, path)
    other["format"] = chapter.EARLIER_CARD  # which had no seal
    card.write_text(json.dumps(other))
    assert "does not fit" in refused(load_weights, path)
    card.write_text(json.dumps(json.loads(text) | {"format": chapter.EARLIER_CARD}))
    assert load_weights(path)


def test_weights_that_do_not_fit_half_precision(run, tmp_path):
    wide = deepcopy(run[1])
    wide.ema["net.map_layer0.weight"][0, 0] = 1e6
    folder = save_run(tmp_path / "wide", wide)
    path = tmp_path / "w.safetensors"
    assert "map_layer0.weight" in refused(export_weights, folder, path)
    assert not path.exists()
    assert "Rename" in refused(export_weights, run[0], tmp_path / "w.bin")


@pytest.mark.parametrize("name", ["cifar10-published", "cifar10-gpu", "cifar10-laptop"])
def test_labels_are_given_where_the_network_takes_them(name):
    config = load_config(name)
    assert config.data["name"] == "cifar10"
    assert config.network["name"] == "unet"
    net = unet_of(config)
    assert bool(net.options["augment"]) == bool(config.data.get("augment"))
    assert build("objective", config.objective)


def unet_of(config):
    "The network of a recipe, without memory for its parameters."
    options = {key: value for key, value in config.network.items() if key != "name"}
    with torch.device("meta"):
        return UNet(**options)


def test_the_published_recipe():
    config = load_config("cifar10-published")
    assert 55e6 < sum(p.numel() for p in unet_of(config).parameters()) < 56.5e6
    assert config.steps == 800_000
    assert config.batch == 1024
    assert config.optimiser == "radam"
    assert config.betas == (0.9, 0.999)
    assert config.learning_rate == 1e-4
    assert config.ema == 0.9999
    assert config.data["augment"] == 0.12


def test_the_published_objective():
    objective = build("objective", load_config("cifar10-published").objective)
    assert (objective.lam, objective.p, objective.eps) == (0, 0.75, 0.001)
    assert objective.schedule(0.0) == 1
    assert objective.schedule(1.0) == pytest.approx(1 / 3200)
    assert objective.times.s == (-4.0, 1.6)
    assert objective.times.t == (-0.9, 1.6)


def test_the_recipe_of_the_laptop():
    config = load_config("cifar10-laptop")
    model, objective = assemble(config)
    assert begin(model, objective, config).steps == 0
    assert config.seconds == 3600
    assert config.precision == "auto"
    assert type(objective.at(0.1)[0]).__name__ == "FlowMatching"
    assert objective.at(0.9)[0].lam == 0.5
    kept = 2 * sum(p.numel() for p in model.parameters())  # bytes, in float16
    assert kept < 4e6


# ------------------------------------------------------------------------- kept runs
KEPT = ("soflow", "flow_matching")


@pytest.fixture
def of_the_clone(monkeypatch):
    "Weights of the clone, and not of a data root."
    monkeypatch.setattr("soflow_edu.cifar10.data_root", lambda: Path("nowhere"))


def mean_scores(card):  # {(steps, sampler): Fréchet distance}
    scores = {}
    for row in card["scores"]:
        mean = sum(row["frechet"]) / len(row["frechet"])
        scores[row["steps"], row["sampler"]] = mean
    return scores


def test_the_kept_runs_are_those_of_their_cards(of_the_clone):
    cards = {name: read_card(f"cifar10-{name}") for name in KEPT}
    for card in cards.values():
        assert card["bytes"] <= 4_000_000
        assert card["seconds"] <= 2 * 75 * 60
        assert "soflow train cifar10-laptop" in card["command"]
    assert cards["soflow"]["model"] == cards["flow_matching"]["model"]
    assert cards["soflow"]["objective"]["name"] == "staged"
    assert cards["flow_matching"]["objective"]["name"] == "flow_matching"
    config = make_config(read_yaml(cards["soflow"]["config"]))
    assert config.objective == load_config("cifar10-laptop").objective


def test_the_kept_scores_keep_the_limits(of_the_clone):
    soflow = mean_scores(read_card("cifar10-soflow"))
    flow = mean_scores(read_card("cifar10-flow_matching"))
    many = flow[50, "euler"]
    assert soflow[1, "jump"] <= 30
    assert soflow[1, "jump"] <= 1.6 * many
    assert soflow[4, "shifted_jump"] <= 1.25 * many


@pytest.mark.slow
def test_the_kept_weights_give_their_score(of_the_clone):
    "The score again where the photographs and the classifier can be read."
    for name in KEPT:
        assert load_weights(f"cifar10-{name}")
    model = load_weights("cifar10-soflow")
    x = model(torch.randn(500, 3, 32, 32, generator=generator()), 1.0, 0.0)
    assert x.isfinite().all()
    assert 0.3 < x.std() < 0.7
    classifier = Path(SHARED) / "cifar_resnet56" / "resnet56.npz"
    if not has_photographs(SHARED) or not classifier.is_file():
        return
    test = cifar10(str(Path(SHARED) / "cifar10"), count=10).test
    judge = resnet56(classifier)
    x = x.clamp(-1, 1)
    report = evaluate_samples(x, test, judge, metrics="frechet", resamples=0)
    once = mean_scores(read_card("cifar10-soflow"))[1, "jump"]
    found = report.values["frechet"]
    assert 0.85 * once < found < 1.4 * once  # few samples: larger


@pytest.fixture
def tuning():
    runs = Path(__file__).parent.parent / "data" / "runs"
    return json.loads((runs / "cifar10-tuning.json").read_text())


def test_the_tuning_is_kept(tuning):
    rates = tuning["rates"]
    assert len({row["learning_rate"] for row in rates}) >= 3
    for row in rates:
        assert row["seconds"] <= 450
        assert row["frechet"] < tuning["scale"]["uniform noise"]
    for points in tuning["curves"].values():
        assert len(points) >= 3
        assert points[-1]["frechet"] == min(point["frechet"] for point in points)


def test_the_tuning_led_to_the_kept_runs(tuning):
    best = min(row["frechet"] for row in tuning["long"])
    card = read_card("cifar10-flow_matching")
    assert best == pytest.approx(card["scores"][0]["frechet"][0], abs=0.01)
    once = mean_scores(read_card("cifar10-soflow"))[1, "jump"]
    last = tuning["recipes"][-1]["frechet"]["one step"]
    assert once == pytest.approx(last, abs=0.01)


# ---------------------------------------------------------------------- damaged files
def in_a_file(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": f"a.{kind}"}


def test_pictures_of_a_table_are_decoded_as_others_are(table):
    "Turned as their note says, and never by the numbers of another space of colours."
    pixels = read_table(table)[0][0].numpy()
    note = Image.Exif()
    note[0x0112] = 6
    lying = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    turned = {"img": [in_a_file(lying, "png", exif=note)], "label": [0]}
    assert np.array_equal(read_table(turned)[0][0], pixels)
    strange = Image.fromarray(pixels).convert("YCbCr")
    spaced = {"img": [in_a_file(strange, "tiff")], "label": [0]}
    found = read_table(spaced)[0][0].numpy().astype(int)
    assert abs(found - pixels).max() <= 3


def test_a_large_picture_in_a_table_is_not_decoded():
    vast = in_a_file(Image.new("RGB", (9000, 9000)), "png")

    def check():
        words = complaint(read_table, {"img": 20 * [vast], "label": 20 * [0]})
        assert "9000 x 9000 x 3" in words

    assert within(check, 2**28) == ""


@pytest.mark.parametrize("option", ["width", "depth"])
def test_a_card_that_asks_for_a_vast_network_is_refused(tmp_path, run, option):
    path = export_weights(run[0], tmp_path / "a.safetensors")
    card = read_card(path)
    card["model"]["network"] = {"name": "dit", "size": 8, "classes": 2, "heads": 2}
    card["model"]["network"][option] = 20_000
    card["seal"] = chapter.seal_of(card)
    path.with_suffix(".json").write_text(json.dumps(card))

    def check():
        assert "asks for a network of more" in complaint(load_weights, path)

    assert within(check, 2**29) == ""
