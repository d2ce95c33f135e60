"CIFAR-10: tables with faults, sources, augmentation against other implementations, stored weights, and the recipes."

import importlib.util
import io
import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image

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
from soflow_edu.training import assemble, begin, save_run, train
from soflow_edu.unet import UNet

SMALL = {
    "name": "unet",
    "width": 8,
    "multipliers": [1],
    "blocks": 1,
    "attention": [],
    "dropout": 0.0,
    "augment": 0,
    "patch": 4,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def png(array, kind="png"):
    Image.fromarray(array).save(file := io.BytesIO(), kind)
    return file.getvalue()


def refused(call, *args, **options):
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def table():
    return rendered_table(60, seed=5)


def changed(table, row, **columns):
    "The table with other entries in one row."
    new = {name: list(values) for name, values in table.items()}
    for name, value in columns.items():
        new[name][row] = value
    return new


# ------------------------------------------------------------------------------------------------- scenes and tables
def test_scenes_repeat_and_differ():
    labels = torch.arange(400) % 10
    a, b = render(labels, generator(1)), render(labels, generator(1))
    assert (
        a.dtype == torch.uint8
        and a.shape == (400, 32, 32, 3)
        and a.equal(b)
        and not a.equal(render(labels, generator(2)))
    )
    assert len(a.flatten(1).unique(dim=0)) == 400
    means = torch.stack([a[labels == k].double().mean(0) for k in range(10)]).flatten(1)
    assert torch.pdist(means).min() > 150  # no two classes look the same on average ...
    within = (
        torch.cdist(
            a[labels == 3].double().flatten(1), a[labels == 3].double().flatten(1)
        )
        .fill_diagonal_(math.inf)
        .min()
    )
    assert within > 1000  # ... and no two pictures of a class are nearly the same


def test_scenes_can_be_told_apart():
    "A linear reader of coarse pictures finds the class much more often than chance, so the classes are real."
    from sklearn.linear_model import LogisticRegression

    law = cifar10("rendered", count=1500)
    coarse = lambda x: torch.nn.functional.avg_pool2d(x.abs(), 4).flatten(1)
    assert (
        LogisticRegression(max_iter=300)
        .fit(coarse(law.points), law.labels)
        .score(coarse(law.test), law.test_labels)
        > 0.35
    )


def test_table_has_the_columns_of_the_hub(table):
    assert (
        list(table) == ["img", "label"]
        and set(table["img"][0]) == {"bytes", "path"}
        and table["label"][:11] == [*range(10), 0]
    )
    assert np.asarray(Image.open(io.BytesIO(table["img"][3]["bytes"]))).shape == (
        32,
        32,
        3,
    )
    pictures, labels = read_table(table)
    assert (
        pictures.equal(render(labels, generator(5)))
        and labels.tolist() == table["label"]
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:30],
        lambda b: b"",
        lambda b: b"GIF89a",
        lambda b: b[:300] + bytes([b[300] ^ 4]) + b[301:],
    ],
    ids=["cut", "head only", "empty", "no picture", "one bit"],
)
def test_broken_files_are_named_counted_and_skipped_only_when_asked(
    table, spoil, capsys
):
    bad = changed(
        changed(
            table,
            7,
            img={"bytes": spoil(table["img"][7]["bytes"]), "path": "seven.png"},
        ),
        9,
        img={"bytes": spoil(table["img"][9]["bytes"]), "path": None},
    )
    words = refused(read_table, bad, "train.parquet")
    assert (
        "2 of 60" in words
        and "train.parquet" in words
        and "row 7 (seven.png)" in words
        and "row 9 (no path)" in words
        and "skip_broken=True" in words
        and "0x" not in words
    )
    pictures, labels = read_table(bad, "train.parquet", skip_broken=True)
    assert "without 2 of 60" in capsys.readouterr().out and len(pictures) == 58
    keep = [row for row in range(60) if row not in (7, 9)]
    whole, all_labels = read_table(table)
    assert pictures.equal(whole[keep]) and labels.equal(all_labels[keep])


def test_only_three_broken_rows_are_listed_and_nothing_left_is_refused(table):
    bad = {
        "img": [{"bytes": b"x", "path": f"{k}.png"} for k in range(60)],
        "label": table["label"],
    }
    assert (
        "60 of 60" in (words := refused(read_table, bad, skip_broken=True))
        and "row 2" in words
        and "row 3" not in words
    )
    assert "empty" in refused(read_table, {"img": [], "label": []})


@pytest.mark.parametrize(
    "img", [None, {"path": "elsewhere.png", "bytes": None}, {}, "name.png"]
)
def test_an_entry_without_bytes_is_broken(table, img):
    assert (
        "row 4" in (words := refused(read_table, changed(table, 4, img=img)))
        and "no bytes" in words
    )


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
        assert (
            "row 11 (odd.png)" in words
            and "1 of 60" in words
            and " x ".join(map(str, array.shape)) in words
        )


@pytest.mark.parametrize("label", [-1, 10, None, 3.0, "cat", True])
def test_labels_out_of_range_are_refused(table, label):
    words = refused(read_table, changed(table, 2, label=label), skip_broken=True)
    assert f"row 2 has {label!r}" in words and "0 to 9" in words


def test_missing_columns(table):
    words = refused(
        read_table, {"image": table["img"], "label": table["label"]}, "here"
    )
    assert "here has the columns image, label" in words and "lacks img" in words
    assert "lacks img, label" in refused(read_table, {})


# ------------------------------------------------------------------------------------------------- sources
class Rows:
    "What the reader needs of a data set of the library datasets."

    def __init__(self, table):
        self.table, self.features, self.column_names = table, None, list(table)

    def __iter__(self):
        return iter(dict(zip(self.table, row)) for row in zip(*self.table.values()))


@pytest.fixture
def pretend(monkeypatch, table):
    "A library datasets that gives our tables; what it is asked for is noted."
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] == "parquet" and any(
            Path(name).stat().st_size == 0 for name in options["data_files"]
        ):
            raise ValueError("Couldn't read the footer")
        if args[0] == chapter.HUB and not asked_hub["answers"]:
            raise ConnectionError("no network")
        return Rows(table)

    asked_hub = {"answers": True}
    modules = {
        "datasets": types.ModuleType("datasets"),
        "datasets.config": types.ModuleType("datasets.config"),
        "huggingface_hub": types.ModuleType("huggingface_hub"),
        "huggingface_hub.constants": types.ModuleType("huggingface_hub.constants"),
    }
    modules["datasets"].load_dataset, modules["datasets"].Image = (
        load_dataset,
        type("Image", (), {}),
    )
    for name in ("datasets.config", "huggingface_hub.constants"):
        modules[name].HF_HUB_OFFLINE = False

    class HfApi:
        def dataset_info(self, name, timeout):
            assert timeout <= 5
            if not asked_hub["answers"]:
                raise OSError("no route")

    modules["huggingface_hub"].HfApi = HfApi
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(asked=asked, hub=asked_hub, modules=modules)


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
    law = build("pictures", {"name": "cifar10", "source": "rendered", "count": 50})
    assert (
        isinstance(law, Pictures)
        and isinstance(law, AugmentedPictures)
        and law.points.shape == (50, 3, 32, 32)
        and law.points.dtype == torch.float32
    )
    assert (
        len(law.test) == 1000
        and law.names == tuple(SCENES)
        and law.classes == 10
        and law.features == "random_filters"
        and "rendered" in law.name
    )
    assert (
        law.points.min() >= -1
        and law.points.max() <= 1
        and not (torch.cdist(law.test.flatten(1), law.points.flatten(1)) < 1).any()
    )
    assert cifar10("rendered", count=50).points.equal(law.points)


def test_auto_takes_the_data_root_first(root, pretend, capsys):
    fill(root / "cifar10")
    law = cifar10()
    assert (
        law.name == "cifar10"
        and law.names == CLASSES
        and law.features == "resnet56"
        and not capsys.readouterr().out
    )
    assert [args[0] for args, _ in pretend.asked] == ["parquet", "parquet"] and all(
        options["streaming"] for _, options in pretend.asked
    )
    assert pretend.asked[0][1]["data_files"] == [
        str(root / "cifar10/train-00000-of-00001.parquet")
    ]


def test_auto_goes_on_to_the_hub_and_then_draws(root, pretend, capsys):
    assert (
        cifar10().name == "cifar10"
        and [args[0] for args, _ in pretend.asked] == [chapter.HUB] * 2
    )
    pretend.hub["answers"] = False
    law = cifar10(count=30)
    assert (
        law.name == "rendered scenes"
        and "rendered scenes, not photographs" in (words := capsys.readouterr().out)
        and chapter.HUB in words
    )
    assert not any(
        pretend.modules[name].HF_HUB_OFFLINE
        for name in ("datasets.config", "huggingface_hub.constants")
    )  # put back
    assert "could not be had" in refused(cifar10, "hub")


def test_the_hub_is_not_waited_for(pretend):
    seen = []
    pretend.hub["answers"] = False
    with chapter.hub_or_cache():
        seen += [
            pretend.modules[name].HF_HUB_OFFLINE
            for name in ("datasets.config", "huggingface_hub.constants")
        ]
    assert seen == [True, True]


def test_a_damaged_root_is_never_replaced_in_silence(root, pretend, table):
    fill(root / "cifar10")
    (root / "cifar10/test-00000-of-00001.parquet").write_bytes(b"")
    for source in ("auto", "root", root / "cifar10"):
        words = refused(cifar10, source)
        assert (
            "test-00000-of-00001.parquet" in words
            and "cannot be read as parquet" in words
        )
    (root / "cifar10/test-00000-of-00001.parquet").unlink()
    for source in ("auto", "root"):
        assert "lacks test-*.parquet" in refused(cifar10, source)


def test_a_missing_root_or_library_says_what_to_do(root, pretend, monkeypatch):
    assert (
        "is no folder" in (words := refused(cifar10, "root")) and "SOFLOW_DATA" in words
    )
    fill(root / "cifar10")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert (
        "pip install" in refused(cifar10, "root")
        and "pip install" in refused(cifar10, "auto")
        and "pip install" in refused(cifar10, "hub")
    )


def test_count_and_skipping(root, pretend, table):
    fill(root / "cifar10")
    assert len((law := cifar10("root", count=25)).points) == 25 and len(law.test) == 60
    table["img"][0], kept = {"bytes": b"broken", "path": None}, table["img"][0]
    try:
        assert "the train table" in refused(cifar10, "root")
        assert len(cifar10("root", skip_broken=True).points) == 59
    finally:
        table["img"][0] = kept


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
    assert "augment" in refused(build, "pictures", {"name": "cifar10", "augmnt": 0.12})


def test_real_parquet_files(tmp_path, table):
    "Written and read by the library datasets itself, with pictures as its Image type, and as plain bytes."
    if not importlib.util.find_spec(
        "datasets"
    ):  # an extra: without it the reader says what to install
        (tmp_path / "train-0.parquet").touch(), (tmp_path / "test-0.parquet").touch()
        assert "pip install" in refused(cifar10, tmp_path)
        return
    import datasets

    kinds = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    for part, features in (("train", kinds), ("test", None)):
        datasets.Dataset.from_dict(table, features=features).to_parquet(
            tmp_path / f"{part}-00000-of-00001.parquet"
        )
    law = cifar10(tmp_path)
    expected = read_table(table)[0].permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(law.points, expected)
    torch.testing.assert_close(law.test, expected)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read as parquet" in refused(cifar10, tmp_path)


def test_the_data_root_of_this_machine():
    "Only where there is one; elsewhere the same reader is tested on rendered tables."
    data = Path(os.environ.get("SOFLOW_DATA", "")) / "cifar10"
    if "SOFLOW_DATA" not in os.environ or not any(data.glob("*.parquet")):
        return
    law = cifar10("root", count=500)
    assert (
        len(law.points) == 500
        and law.names == CLASSES
        and sorted(law.test_labels.unique().tolist()) == list(range(10))
    )
    assert 0.2 < law.points.std() < 0.8 and law.points.aminmax() == (-1, 1)


# ------------------------------------------------------------------------------------------------- augmentation
def only(n, **given):
    zero = {
        "mirror": torch.zeros(n) > 0,
        "scale": torch.zeros(n),
        "squeeze": torch.zeros(n),
        "angle": torch.zeros(n),
        "shift": torch.zeros(n, 2),
    }
    return Warps(**zero | given)


@pytest.fixture(scope="module")
def x():
    return render(torch.arange(30) % 10, generator(9)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def smooth(x):
    return torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, 1.5, 1.5)))


def test_labels_have_the_published_frequencies_and_moments():
    n, p = 200_000, 0.12
    labels = draw_warps(n, p, generator(3)).labels.double()
    share = (labels != 0).double().mean(0)
    for value, expected in zip(share.tolist(), (0.5, p, p, p / 2, p, p)):
        assert abs(value - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
    assert set(labels[:, 0].tolist()) == {0.0, 1.0}
    for k in (1, 4, 5):
        assert (
            scipy.stats.kstest(labels[labels[:, k] != 0, k].numpy(), "norm").pvalue
            > 1e-4
        )
    lengths = labels[:, 2:4].norm(dim=1)
    assert scipy.stats.kstest(lengths[lengths > 0].numpy(), "halfnorm").pvalue > 1e-4
    turned = labels[labels[:, 3] != 0]
    assert (
        scipy.stats.kstest(
            torch.atan2(turned[:, 3], turned[:, 2]).numpy(),
            "uniform",
            (-math.pi, 2 * math.pi),
        ).pvalue
        > 1e-4
    )
    angle = draw_warps(n, p, generator(3)).angle
    assert (
        scipy.stats.kstest(
            angle[angle != 0].double().numpy(), "uniform", (-math.pi, 2 * math.pi)
        ).pvalue
        > 1e-4
        and abs((angle == 0).double().mean() - 0.5) < 0.01
    )
    happens = torch.stack(
        [labels[:, 1] != 0, labels[:, 2] != 0, labels[:, 4] != 0, labels[:, 0] != 0]
    ).double()
    assert (
        torch.corrcoef(happens) - torch.eye(4)
    ).abs().max() < 5 / n**0.5  # independently of one another
    assert ((labels[:, 4] != 0) == (labels[:, 5] != 0)).all()


def test_labels_give_the_matrix():
    "Without the turned half of the squeezes the labels alone say what was done, by formulas written out again; a turned one by its angle."
    warps = draw_warps(5000, 0.6, generator(4))
    labels, matrix = warps.labels.double(), warps.matrix.double()
    plain = warps.angle == 0
    for row, m in zip(labels[plain][:500], matrix[plain][:500]):
        expected = np.diag(
            [2 ** (0.2 * (row[1] + row[2])), 2 ** (0.2 * (row[1] - row[2]))]
        )
        np.testing.assert_allclose(m[:, :2], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m[:, 2], row[4:] / 4, rtol=1e-5, atol=1e-7)
    for i in (~plain).nonzero()[:500, 0].tolist():
        r, a = float(warps.angle[i]), 2 ** (0.2 * float(warps.squeeze[i]))
        turn = np.array([[math.cos(r), -math.sin(r)], [math.sin(r), math.cos(r)]])
        np.testing.assert_allclose(
            matrix[i, :, :2],
            2 ** (0.2 * float(warps.scale[i]))
            * turn
            @ np.diag([a, 1 / a])
            @ np.linalg.inv(turn),
            rtol=1e-4,
            atol=1e-5,
        )
    torch.testing.assert_close(
        torch.linalg.det(matrix[:, :, :2]),
        torch.exp2(0.4 * labels[:, 1]),
        rtol=1e-4,
        atol=1e-5,
    )  # a squeeze keeps areas


def test_no_augmentation_but_mirrors_at_p_zero(x):
    y, labels = augment(x, 0.0, generator(5))
    assert (labels[:, 1:] == 0).all() and 0 < labels[:, 0].sum() < len(x)
    for before, after, label in zip(x, y, labels):
        assert after.equal(before.flip(2) if label[0] else before)


def test_unwarped_rows_are_bit_identical_and_all_is_reproducible(x):
    y, labels = augment(x, 0.3, generator(6))
    again, same = augment(x.clone(), 0.3, generator(6))
    assert y.equal(again) and labels.equal(same)
    still = (labels[:, 1:] == 0).all(1)
    assert 0 < still.sum() < len(x)
    for before, after, label in zip(x[still], y[still], labels[still]):
        assert after.equal(before.flip(2) if label[0] else before)
    for before, after, label in zip(x[~still], y[~still], labels[~still]):
        assert (after - (before.flip(2) if label[0] else before)).abs().max() > 0.01


def test_the_picture_given_is_not_changed(x):
    before = x.clone()
    augment(x, 1.0, generator(7))
    assert x.equal(before)


def test_doubling_and_halving_undo_one_another(x):
    double, halve = doubling(32)
    torch.testing.assert_close(halve @ double, torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(double.sum(1), torch.ones(64))
    torch.testing.assert_close(
        chapter.resample(x, only(len(x)).matrix), x, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("right, down", [(3, 0), (0, -2), (-4, 5)])
def test_whole_pixel_shifts_are_rolls(x, right, down):
    "One pixel is a quarter of w, since the shift is w / 8 of 32 pixels; w_x points right and w_y down."
    y = warp(
        x, only(len(x), shift=torch.tensor([right / 4, down / 4]).expand(len(x), 2))
    )
    assert (y - x.roll((down, right), (2, 3)))[:, :, 8:-8, 8:-8].abs().max() < 1e-3


def by_scipy(x, matrix):
    swap = matrix.flip(0)[:, [1, 0, 2]].double().numpy()
    back, centre = np.linalg.inv(swap[:, :2]), np.full(2, (x.shape[1] - 1) / 2)
    offset = centre - back @ (centre + x.shape[1] / 2 * swap[:, 2])
    return torch.stack(
        [
            torch.from_numpy(
                scipy.ndimage.affine_transform(
                    c.double().numpy(), back, offset, order=3, mode="reflect"
                )
            )
            for c in x
        ]
    )


@pytest.mark.parametrize(
    "given",
    [
        {"scale": torch.linspace(-2.5, 2.5, 30)},
        {"squeeze": torch.linspace(-2, 2, 30)},
        {"squeeze": torch.full((30,), 1.5), "angle": torch.linspace(-3, 3, 30)},
        {"shift": torch.linspace(-2, 2, 60).view(30, 2)},
        {
            "scale": torch.linspace(-1, 1, 30),
            "squeeze": torch.full((30,), -1.0),
            "angle": torch.linspace(-3, 3, 30),
            "shift": torch.linspace(-1, 1, 60).view(30, 2),
        },
    ],
    ids=["scale", "squeeze", "turned squeeze", "shift", "all"],
)
def test_warps_beside_scipy(smooth, given):
    warps = only(30, **given)
    expected = torch.stack(
        [by_scipy(*pair) for pair in zip(smooth, warps.matrix)]
    ).clamp(-1, 1)
    gap = (warp(smooth, warps) - expected).abs()
    assert gap.mean() < 2e-3 and gap.max() < 0.06


def test_enlarging_beside_pillow(smooth):
    "Twice as large (w = 5) is Pillow's own resize of the middle."
    big = warp(smooth[:3], only(3, scale=torch.full((3,), 5.0)))
    for picture, ours in zip(smooth[:3], big):
        channel = Image.fromarray(picture[0].numpy()).resize((64, 64), Image.BICUBIC)
        assert np.abs(np.asarray(channel)[16:48, 16:48] - ours[0].numpy()).max() < 0.04


def test_shrinking_does_not_alias():
    "Stripes finer than the shrunk grid can hold must fade and not turn into broad ones."
    stripes = torch.cos(math.pi * 0.9 * torch.arange(32.0)).expand(1, 1, 32, 32)
    small = warp(stripes, only(1, scale=torch.tensor([-3.0])))[0, 0, 12:20, 8:24]
    assert small.abs().mean() < 0.5 * stripes.abs().mean()


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: augment(torch.zeros(2, 3, 8, 9), 0.1, generator()), "squares"),
        (lambda: augment(torch.zeros(3, 8, 8), 0.1, generator()), "squares"),
        (lambda: draw_warps(4, 1.2, generator()), "between 0 and 1"),
        (lambda: draw_warps(4, -0.1, generator()), "between 0 and 1"),
    ],
)
def test_augmentation_refuses(call, word):
    assert word in refused(call)


# ------------------------------------------------------------------------------------------------- samples, training, judging
def test_samples_carry_labels_only_when_augmented():
    plain, flipped, full = (
        cifar10("rendered", count=40, **options)
        for options in ({}, {"flip": True}, {"augment": 0.5})
    )
    x, y = plain.sample(64, generator(1))
    among = lambda x, points: (
        torch.cdist(x.flatten(1).double(), points.flatten(1).double()) < 1e-3
    ).any(1)
    assert among(x, plain.points).all() and x.shape == (64, 3, 32, 32)
    x, y = flipped.sample(64, generator(1))
    straight, mirrored = among(x, plain.points), among(x, plain.points.flip(3))
    assert (straight | mirrored).all() and 10 < mirrored.sum() < 54
    x, y, extras = full.sample(64, generator(1))
    still = (extras["augment"][:, 1:] == 0).all(1)
    assert (
        list(extras) == ["augment"]
        and extras["augment"].shape == (64, 6)
        and 0 < still.sum() < 40
    )
    assert among(
        x[still], torch.cat([plain.points, plain.points.flip(3)])
    ).all() and full.points.equal(plain.points)
    assert full.sample(64, generator(1))[0].equal(x)


def test_the_network_is_told(tmp_path):
    "One step on augmented pictures moves the weights that read the labels; without augmentation they stay."
    for p in (0.5, 0.0):
        law = cifar10("rendered", count=40, augment=p)
        config = Config(
            network=SMALL | {"augment": 6},
            steps=2,
            batch=16,
            learning_rate=1e-2,
            warmup=1,
        )
        model, objective = assemble(config)
        before = model.net.map_augment.weight.detach().clone()
        for step in train(model, objective, law, config):
            pass
        assert model.net.map_augment.weight.equal(before) == (p == 0.0)


def test_random_filters_see_faults():
    judge = RandomFilters()
    assert RandomFilters().second.weight.equal(
        judge.second.weight
    ) and not RandomFilters(1).second.weight.equal(judge.second.weight)
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 64) and "colour" in refused(
        judge, torch.zeros(2, 1, 32, 32)
    )
    assert not any(p.requires_grad for p in judge.parameters())


class Shifted:
    "A map whose one-step pictures differ from its ODE's by a known amount in the left half."

    path = build("path", "linear")

    def velocity(self, x, t, y=None):
        return x

    def solution(self, x, t, s, y=None):
        end = x * torch.exp(torch.as_tensor(s - t, dtype=x.dtype)).reshape(-1, 1, 1, 1)
        end[..., :2] += 0.3
        return end


def test_distance_maps():
    x1 = torch.randn(12, 3, 4, 4, generator=generator()).double()
    report = compare(
        Shifted(), OdeFlow(Shifted(), 1e-8), x1, metrics=("one_step", "distance_maps")
    )
    maps = report.results["distance_maps"]
    assert maps.shape == (10, 4, 4)
    torch.testing.assert_close(
        maps[:, :, :2], torch.full((10, 4, 2), 0.3).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        maps[:, :, 2:], torch.zeros(10, 4, 2).double(), atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(
        report.results["distance_of_each"], 0.3 / 2**0.5, atol=1e-5
    )
    assert chapter.show_distances(report).axes and "distance_maps" not in report.values
    assert "need pictures" in refused(
        compare,
        Shifted2(),
        OdeFlow(Shifted2(), 1e-5),
        torch.randn(4, 2),
        metrics="distance_maps",
    )


class Shifted2:
    path = build("path", "linear")

    def velocity(self, x, t, y=None):
        return x

    def solution(self, x, t, s, y=None):
        return x


# ------------------------------------------------------------------------------------------------- weights and recipes
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = Config(
        network=SMALL,
        steps=2,
        batch=4,
        data={"name": "cifar10", "source": "rendered"},
        seed=11,
    )
    model, objective = assemble(config)
    for step in train(model, objective, cifar10("rendered", count=10), config):
        pass
    return save_run(folder / "run", step.run), step.run


def test_weights_go_and_come_back(run, tmp_path):
    folder, given = run
    path = export_weights(
        folder,
        tmp_path / "deep" / "small.safetensors",
        "soflow train x",
        {"hardware": "two cores"},
    )
    card = read_card(path)
    assert (
        card["seed"] == 11
        and card["step"] == 2
        and card["command"] == "soflow train x"
        and card["hardware"] == "two cores"
        and card["bytes"] == path.stat().st_size
    )
    assert "source: rendered" in card["config"]
    model = load_weights(path)
    assert not model.training and all(
        p.dtype == torch.float32 and not p.requires_grad for p in model.parameters()
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, given.ema[name].half().float(), rtol=0, atol=0
        )
    x = torch.randn(2, 3, 32, 32, generator=generator())
    assert (model(x, 1.0, 0.0) - x).abs().max() > 0


def test_named_weights_are_found_in_the_data_root(run, root):
    export_weights(run[0], root / "runs" / "mine.safetensors")
    assert load_weights("mine").spec() == run[1].model.spec()
    assert "mine2.safetensors was not found" in refused(load_weights, "mine2") and str(
        root
    ) not in refused(load_weights, "mine2")


def test_damaged_weights_are_refused(run, tmp_path):
    path = export_weights(run[0], tmp_path / "w.safetensors")
    content, card = path.read_bytes(), path.with_suffix(".json").read_text()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "checksum" in refused(load_weights, path)
    path.write_bytes(content)
    assert load_weights(path)
    for text, word in ((card[:-5], "damaged"), ("{}", "no card"), ("[]", "no card")):
        path.with_suffix(".json").write_text(text)
        assert word in refused(load_weights, path)
    path.with_suffix(".json").unlink()
    assert "missing" in refused(load_weights, path)
    path.with_suffix(".json").write_text(
        json.dumps(
            json.loads(card)
            | {"model": json.loads(card)["model"] | {"network": SMALL | {"width": 12}}}
        )
    )
    assert "does not fit" in refused(load_weights, path)


def test_weights_that_do_not_fit_half_precision(run, tmp_path):
    from copy import deepcopy

    wide = deepcopy(run[1])
    wide.ema["net.map_layer0.weight"][0, 0] = 1e6
    save_run(tmp_path / "wide", wide)
    assert "map_layer0.weight" in refused(
        export_weights, tmp_path / "wide", tmp_path / "w.safetensors"
    )
    assert not (tmp_path / "w.safetensors").exists() and "Rename" in refused(
        export_weights, run[0], tmp_path / "w.bin"
    )


@pytest.mark.parametrize("name", ["cifar10-published", "cifar10-gpu", "cifar10-laptop"])
def test_recipes_can_be_begun(name):
    config = load_config(name)
    assert config.data["name"] == "cifar10" and config.network["name"] == "unet"
    with torch.device("meta"):
        net = UNet(
            **{key: value for key, value in config.network.items() if key != "name"}
        )
    assert bool(net.options["augment"]) == bool(
        config.data.get("augment")
    )  # labels are given exactly where the network takes them
    objective = build("objective", config.objective)
    if name == "cifar10-published":
        assert (
            55e6 < sum(p.numel() for p in net.parameters()) < 56.5e6
            and config.steps == 800_000
            and config.batch == 1024
            and config.optimiser == "radam"
            and config.betas == (0.9, 0.999)
        )
        assert (
            (objective.lam, objective.p, objective.eps) == (0, 0.75, 0.001)
            and objective.schedule(0.0) == 1
            and objective.schedule(1.0) == pytest.approx(1 / 3200)
        )
        assert (
            objective.times.s == (-4.0, 1.6)
            and objective.times.t == (-0.9, 1.6)
            and config.learning_rate == 1e-4
            and config.ema == 0.9999
            and config.data["augment"] == 0.12
        )
    if name == "cifar10-laptop":
        model, objective = assemble(config)
        assert (
            begin(model, objective, config).steps == 0
            and config.seconds == 3600
            and config.precision == "auto"
        )
        assert (
            objective.at(0.1)[0].__class__.__name__ == "FlowMatching"
            and objective.at(0.9)[0].lam == 0.5
        )
        assert (
            sum(p.numel() for p in model.parameters()) * 2 < 4e6
        )  # the weights that are kept, in float16


def test_the_kept_runs_are_those_of_their_cards(monkeypatch):
    "The committed pair: size, checksum, the same network, the scores of the card; where the photographs and the classifier can be read, the one-step score again."
    monkeypatch.setattr(
        "soflow_edu.cifar10.data_root", lambda: Path("nowhere")
    )  # those of the clone
    models, cards = (
        {name: function(f"cifar10-{name}") for name in ("soflow", "flow_matching")}
        for function in (load_weights, read_card)
    )
    assert all(
        card["bytes"] <= 4_000_000
        and card["seconds"] <= 2 * 75 * 60
        and "soflow train cifar10-laptop" in card["command"]
        for card in cards.values()
    )
    assert (
        cards["soflow"]["model"] == cards["flow_matching"]["model"]
        and cards["soflow"]["objective"]["name"] == "staged"
        and cards["flow_matching"]["objective"]["name"] == "flow_matching"
    )
    assert (
        make_config(read_yaml(cards["soflow"]["config"])).objective
        == load_config("cifar10-laptop").objective
    )
    score = {
        (name, row["steps"], row["sampler"]): sum(row["frechet"]) / len(row["frechet"])
        for name, card in cards.items()
        for row in card["scores"]
    }
    once, many = score["soflow", 1, "jump"], score["flow_matching", 50, "euler"]
    assert (
        once <= 30
        and once <= 1.6 * many
        and score["soflow", 4, "shifted_jump"] <= 1.25 * many
    )
    x = models["soflow"](torch.randn(500, 3, 32, 32, generator=generator()), 1.0, 0.0)
    assert x.isfinite().all() and 0.3 < x.std() < 0.7
    root = Path(os.environ.get("SOFLOW_DATA", ""))
    if (
        "SOFLOW_DATA" in os.environ
        and (root / "cifar_resnet56" / "resnet56.npz").is_file()
        and any((root / "cifar10").glob("*.parquet"))
    ):
        test = cifar10(str(root / "cifar10"), count=10).test
        found = evaluate_samples(
            x.clamp(-1, 1),
            test,
            resnet56(root / "cifar_resnet56" / "resnet56.npz"),
            metrics="frechet",
            resamples=0,
        ).values["frechet"]
        assert 0.85 * once < found < 1.4 * once  # few samples: larger


def test_the_tuning_is_kept():
    rows = json.loads(
        (
            Path(__file__).parent.parent / "data" / "runs" / "cifar10-tuning.json"
        ).read_text()
    )
    assert len({row["learning_rate"] for row in rows["rates"]}) >= 3 and all(
        row["seconds"] <= 450 and row["frechet"] < rows["scale"]["uniform noise"]
        for row in rows["rates"]
    )
    assert min(row["frechet"] for row in rows["long"]) == pytest.approx(
        read_card("cifar10-flow_matching")["scores"][0]["frechet"][0], abs=0.01
    )
    assert {
        (row["steps"], row["sampler"]): sum(row["frechet"]) / len(row["frechet"])
        for row in read_card("cifar10-soflow")["scores"]
    }[1, "jump"] == pytest.approx(rows["recipes"][-1]["frechet"]["one step"], abs=0.01)
    for points in rows["curves"].values():
        assert len(points) >= 3 and points[-1]["frechet"] == min(
            p["frechet"] for p in points
        )
