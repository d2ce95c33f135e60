"""Latent files: killed and resumed, written by several processes.

Also by a diffusers autoencoder; copied, forked, trained on."""

import copy
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from faults import within
from helpers import complaint, python
from readers import foreign, patchwork
from soflow_edu import latents
from soflow_edu.config import alone, make_config
from soflow_edu.core import InputError, build
from soflow_edu.distributions import law_of
from soflow_edu.latents import (
    LATENT_FILE,
    SCALE,
    Blocks,
    Latents,
    centre_crop,
    decoder_of_latents,
    encode,
    image_folder,
    new_latent_file,
    open_autoencoder,
    read_picture,
    rows_in_place,
)
from soflow_edu.training import assemble, load_run, resume_run, train

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SETTINGS = ("--autoencoder", "blocks", "--size", "64", "--part", "3")


def encoding(images, out, *options, launcher=()):
    "A process that encodes."
    command = [sys.executable, *launcher, "-m", "soflow_edu", "encode"]
    command += [str(images), str(out), *SETTINGS, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def again(images, out, **options):
    "The same call in this process."
    return encode(images, out, "blocks", size=64, part=3, **options)


def unwrapped(text):
    "What was printed, without the breaks between its lines."
    return " ".join(text.split())


def contents(out):
    "Data sets and attributes of a latent file."
    with h5py.File(Path(out) / LATENT_FILE) as file:
        parts = {name: part[()] for name, part in file.items()}
        return parts, dict(file.attrs)


def latents_in(out):
    return contents(out)[0]["latents"]


def same(a, b):
    "Whether two latent files hold the same."
    parts, about = contents(a)
    others, theirs = contents(b)
    if parts.keys() != others.keys() or about != theirs:
        return False
    for name, part in parts.items():
        if part.dtype != others[name].dtype or not np.array_equal(part, others[name]):
            return False
    return True


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty noisy pictures of several sizes in two classes.

    Beside them lies what one uninterrupted call makes of them."""
    root = tmp_path_factory.mktemp("pictures") / "images"
    numbers = np.random.default_rng(0)
    for k in range(20):
        kind = ("cat", "dog")[k % 3 == 0]
        path = root / kind / f"{k:02d}.{('png', 'JPEG')[k % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (70 + 9 * k, 200 - 5 * k, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    again(root, root.parent / "whole", flip=True)
    return root


def test_rows_are_those_of_the_autoencoder(images):
    parts, attributes = contents(images.parent / "whole")
    folder = image_folder(images)
    for k, (name, label) in enumerate(zip(folder.files, folder.labels, strict=True)):
        x = read_picture(images / name, 64)[None]
        for row, picture in ((k, x), (20 + k, x.flip(3))):
            expected = torch.cat(Blocks().encode(picture), 1)[0]
            found = parts["latents"][row]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert parts["labels"][row] == label
            assert folder.classes[label] == Path(name).parent.name
    assert {name: part.dtype.str for name, part in parts.items()} == {
        "latents": "<f4",
        "labels": "<i8",
        "amount": "<i8",
        "latent_size": "<i8",
    }
    assert parts["latents"].shape == (40, 8, 8, 8)
    assert attributes == {
        "autoencoder": "blocks",
        "size": 64,
        "classes": '["cat", "dog"]',
        "scale": SCALE,
    }


def test_the_decoder_is_that_of_the_file(images, tmp_path):
    shutil.copytree(images.parent / "whole", tmp_path / "whole")
    data = {"name": "latents", "path": str(tmp_path / "whole")}
    coder = Blocks()
    z = torch.randn(2, 4, 8, 8)
    expected = coder.decode(z / coder.scale).clamp(-1, 1)
    assert torch.equal(decoder_of_latents(data)(z), expected)
    with h5py.File(tmp_path / "whole" / LATENT_FILE, "a") as file:
        del file.attrs["autoencoder"]
    with pytest.raises(InputError, match="do not say by which autoencoder"):
        decoder_of_latents(data)
    assert torch.equal(decoder_of_latents(data, "blocks")(z), expected)


EDGES = [(600, 1000), (1000, 600), (513, 700), (90, 200), (64, 64)]


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("size", [64, 256])
def test_the_crop_is_that_of_adm(edges, size):
    "Halving boxes, cubic interpolation, the middle: from the description, by arrays."
    numbers = np.random.default_rng(1)
    picture = Image.fromarray(numbers.integers(0, 256, (*edges, 3), np.uint8))
    given = picture
    while min(given.size) >= 2 * size:
        given = given.resize((given.width // 2, given.height // 2), Image.BOX)
    ratio = size / min(given.size)
    fitting = (round(given.width * ratio), round(given.height * ratio))
    pixels = np.array(given.resize(fitting, Image.BICUBIC))
    top = (pixels.shape[0] - size) // 2
    left = (pixels.shape[1] - size) // 2
    expected = pixels[top : top + size, left : left + size]
    assert np.array_equal(np.array(centre_crop(picture, size)), expected)


KILLED_EVERYWHERE = """
import os, shutil, sys
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)
from soflow_edu import latents

root = Path(sys.argv[1])
home = Path(sys.argv[2])
broken = sys.argv[3] == "broken"
OPERATIONS = (
    "replace", "mkdir", "unlink", "rmdir", "pwrite", "posix_fallocate", "fsync"
)
SETTINGS = {"size": 16, "part": 2, "workers": 1, "skip_broken": broken}
count = 0


def counted(real, last, *args, **options):
    "An operation on files, before which the process may die."
    global count
    count += 1
    if count == last:
        os._exit(9)
    return real(*args, **options)


def encode_until(out, last):
    "Encodes, and dies at operation number `last`."
    for name in OPERATIONS:
        setattr(os, name, partial(counted, getattr(os, name), last))
    try:
        latents.encode(root, out, "blocks", **SETTINGS)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def attempt(out, last):
    "The status of a child that dies at its operation number `last`."
    child = os.fork()
    if not child:
        encode_until(out, last)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


assert attempt(home / "whole", -1) == 0
whole = (home / "whole" / latents.LATENT_FILE).read_bytes()
for last in range(1, 1000):
    out = home / str(last)
    code = attempt(out, last)
    assert code in (0, 9), (last, code)
    assert attempt(out, -1) == 0, last
    left = sorted(path.name for path in out.iterdir())
    assert left == [latents.LATENT_FILE] + ["unreadable.csv"] * broken, (last, left)
    assert (out / latents.LATENT_FILE).read_bytes() == whole, last
    shutil.rmtree(out)
    if code == 0:
        break
print(last)
"""


@pytest.mark.parametrize("kind", ["sound", "broken"])
@pytest.mark.slow
def test_a_kill_after_any_operation_on_files_loses_nothing(images, tmp_path, kind):
    """The process ends for good at its first, second, third, ... operation.

    The next call makes the file of an uninterrupted one, to the byte."""
    for k in range(5):
        folder = tmp_path / "images" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / image_folder(images).files[k], folder / f"{k}.png")
    if kind == "broken":
        (tmp_path / "images/a/2.png").write_text("no picture")
    command = [sys.executable, "-c", KILLED_EVERYWHERE]
    command += [tmp_path / "images", tmp_path / "out", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 15  # so many places were tried


def count_of_marks(folder):
    return len(list(folder.glob("encoding/part-*")))


def killed_at_a_moment(images, out, moments):
    "Whether a process was killed after a few parts; else it has ended by itself."
    marks = count_of_marks(out)
    deadline = time.time() + 120
    job = encoding(images, out, "--flip")
    while job.poll() is None and count_of_marks(out) < marks + 3:
        if time.time() > deadline:
            break
        time.sleep(0.001)
    time.sleep(0.01 * moments.random())
    killed = job.poll() is None
    if killed:
        job.kill()
    said = job.communicate()
    assert job.returncode in (0, -signal.SIGKILL), said
    return killed


@pytest.mark.slow
def test_killed_for_good_again_and_again(images, tmp_path):
    moments = random.Random(0)
    kills = 0
    while not (tmp_path / LATENT_FILE).exists():
        kills += killed_at_a_moment(images, tmp_path, moments)
    again(images, tmp_path, flip=True)  # the last kill may have come after the move
    assert kills >= 2
    assert same(tmp_path, images.parent / "whole")
    assert not (tmp_path / "encoding").exists()


def test_what_is_done_is_not_done_again(images, tmp_path, monkeypatch):
    "After a stop only parts without a mark are encoded; a damaged mark is no mark."
    calls = []
    real = Blocks.encode

    def stopping(self, x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(Blocks, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        again(images, tmp_path)
    assert count_of_marks(tmp_path) == 3
    (tmp_path / "encoding/part-0000001.json").write_text('{"0": ')
    calls[:] = [0] * 10
    again(images, tmp_path)
    assert len(calls) - 10 == 7 - 2
    whole = latents_in(images.parent / "whole")
    assert np.array_equal(latents_in(tmp_path), whole[:20])


@pytest.mark.slow
def test_two_processes_write_the_same_file(images, tmp_path):
    """Each its own parts; the second call is told that there is nothing to do.

    An error is said once, without a traceback."""
    job = encoding(images, tmp_path, "--flip", launcher=TORCHRUN)
    said = job.communicate()
    assert job.returncode == 0, said
    assert said[0].count("Written to") == 1, said
    assert same(tmp_path, images.parent / "whole")
    assert [path.name for path in tmp_path.iterdir()] == [LATENT_FILE]
    job = encoding(images, tmp_path, "--size", "128", launcher=TORCHRUN)
    errors = job.communicate()[1]
    assert job.returncode != 0, errors
    assert errors.count("soflow:") == 1, errors
    assert "exists already" in unwrapped(errors), errors
    assert "Connection closed" not in errors, errors


def test_the_second_process_does_its_share(images, tmp_path):
    "With the first one absent its parts stay open, and those of the second are done."
    folder = image_folder(images)
    lists = (folder.files, folder.labels, folder.classes)
    plan = latents.Plan(str(images.resolve()), *lists, "blocks", 64, False, 3)
    assert latents.begin_encoding(plan, Blocks(), tmp_path)
    work = tmp_path / "encoding"
    rows = rows_in_place(work / "rows.hdf5")
    latents.fill(plan, Blocks(), work, [1, 3, 5], rows, 16, 2, False)
    done = sorted(path.name[-6] for path in work.glob("part-*"))
    assert done == ["1", "3", "5"]
    with pytest.raises(InputError, match="still being written: 3 of 7 parts"):
        Latents(str(tmp_path))
    for hidden in (work, work / "rows.hdf5"):
        with pytest.raises(InputError, match="still being written|is missing"):
            Latents(str(hidden))
    again(images, tmp_path)
    whole = latents_in(images.parent / "whole")
    assert np.array_equal(latents_in(tmp_path), whole[:20])


def test_a_second_call_beside_a_living_one_is_refused(images, tmp_path):
    with alone(tmp_path):
        job = encoding(images, tmp_path)
        errors = unwrapped(job.communicate()[1])
        assert "is being written by process" in errors
        assert job.returncode == 2
    again(images, tmp_path)


@pytest.fixture
def damaged(images, tmp_path):
    "A copy of the pictures, of which two are cut."
    root = tmp_path / "images"
    shutil.copytree(images, root)
    files = image_folder(root).files
    for name in (files[4], files[15]):
        (root / name).write_bytes((root / name).read_bytes()[:300])
    return root


def test_pictures_that_cannot_be_read_are_listed_and_left_out_when_asked(
    images, damaged, tmp_path
):
    files = image_folder(images).files
    out = tmp_path / "out"
    job = encoding(damaged, out)
    words = unwrapped(job.communicate()[1])
    assert job.returncode == 2
    assert "Traceback" not in words, words
    assert f"2 of 20 pictures cannot be read: {files[4]}" in words, words
    assert "--skip-broken" in words, words
    assert (out / "unreadable.csv").read_text().count("\n") == 3
    assert not (out / LATENT_FILE).exists()
    (damaged / files[4]).unlink()  # removed, as the message proposes
    shutil.copy(images / files[15], damaged / files[15])  # mended
    again(damaged, out, skip_broken=True)
    parts = contents(out)[0]
    whole = contents(images.parent / "whole")[0]
    kept = [k for k in range(20) if k != 4]
    assert parts["amount"] == 19
    assert np.array_equal(parts["latents"], whole["latents"][kept])
    assert np.array_equal(parts["labels"], whole["labels"][kept])
    assert (out / "unreadable.csv").read_text().count("\n") == 2
    again(images, tmp_path / "sound")
    assert not (tmp_path / "sound/unreadable.csv").exists()


def test_a_disk_that_fails_is_not_a_broken_picture(images, tmp_path, monkeypatch):
    def failing(path, size):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(latents, "read_picture", failing)
    with pytest.raises(OSError, match="Input/output error"):
        again(images, tmp_path, skip_broken=True)


def test_a_full_disk_is_noticed_before_anything_is_encoded(
    images, tmp_path, monkeypatch
):
    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    def never(self, x):
        pytest.fail("encoded")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(Blocks, "encode", never)
    words = "GB, which the disk does not have .No space left"
    with pytest.raises(InputError, match=words):
        again(images, tmp_path)


def test_other_settings_do_not_go_on_with_unfinished_work(
    images, tmp_path, monkeypatch
):
    real = Blocks.encode

    def stopped(self, x):
        raise KeyboardInterrupt

    monkeypatch.setattr(Blocks, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        again(images, tmp_path)
    with pytest.raises(InputError, match="flip is False, not True; part is 3, not 4"):
        encode(images, tmp_path, "blocks", size=64, part=4, flip=True)
    more = tmp_path / "more"
    shutil.copytree(images, more)
    monkeypatch.setattr(Blocks, "encode", real)
    plan = tmp_path / "encoding/plan.json"
    moved = plan.read_text().replace(str(images.resolve()), str(more.resolve()))
    plan.write_text(moved)
    shutil.copy(more / "cat/01.JPEG", more / "cat/99.JPEG")
    with pytest.raises(InputError, match="1 pictures are new: cat/99.JPEG"):
        again(more, tmp_path)
    plan.write_text("{")
    with pytest.raises(InputError, match="plan.json is damaged"):
        again(more, tmp_path)


@pytest.fixture
def small_vae(tmp_path):
    "A folder that diffusers saved, with random weights, and the network itself."
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13,
    ).eval()
    net.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae", net


@pytest.mark.slow
def test_an_autoencoder_of_diffusers_is_read_from_a_folder(small_vae, images, tmp_path):
    "Mean, standard deviation and scale are those of diffusers."
    folder, net = small_vae
    coder = open_autoencoder(folder, "cpu")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    ones = torch.ones(1, 4, 8, 8)
    with torch.no_grad():
        law = net.encode(x).latent_dist
        back = net.decode(ones).sample
    mean, std = coder.encode(x)
    torch.testing.assert_close(mean, law.mean)
    torch.testing.assert_close(std, law.std)
    torch.testing.assert_close(coder.decode(ones), back)
    path = encode(images, tmp_path / "out", str(folder), size=64, device="cpu")
    data = Latents(str(path))
    assert coder.factor == 8
    assert (std > 0).all()
    assert data.scale == 0.13
    assert data.read(range(20))[:, 4:].min() > 0
    for name in ("sd-vae-ft-mse", tmp_path):
        with pytest.raises(InputError, match="could not be loaded"):
            open_autoencoder(name, "cpu")


@pytest.fixture
def some(tmp_path):
    "A file of 64 latents of size 8 in 4 classes: its path, and the numbers in it."
    numbers = np.random.default_rng(0).normal(size=(64, 8, 8, 8))
    rows = numbers.astype(np.float32) ** 2
    path = new_latent_file(tmp_path / "some.hdf5", np.arange(64) % 4, 8)
    rows_in_place(path).write(0, rows)
    return str(path), rows


def test_it_can_be_copied_pickled_and_forked(some):
    path, rows = some
    data = Latents(path)
    data.sample(16, torch.Generator())  # threads and the file are open now
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert np.array_equal(other.read([3, 1]), rows[[3, 1]])
    child = os.fork()
    if not child:
        right = np.array_equal(data.read(np.arange(64)), rows)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(IndexError, match="0 to 63"):
        data.read([64])
    with pytest.raises(InputError, match="threads is 0"):
        build("pictures", {"name": "latents", "path": path, "threads": 0})


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.slow
def test_it_can_be_loaded_by_workers(some, start):
    data = Latents(some[0])
    data.sample(16, torch.Generator())
    workers = {"num_workers": 2, "multiprocessing_context": start}
    batches = list(torch.utils.data.DataLoader(data, 16, **workers))
    labels = torch.cat([y for _, y in batches])
    assert batches[0][0].shape == (16, 4, 8, 8)
    assert torch.equal(labels, data.labels)


WAYS = {
    "chunked": (np.float32, {"chunks": (4, 8, 8, 8), "compression": "gzip"}),
    "half": (np.float16, {}),
}


@pytest.mark.parametrize("kind", WAYS)
def test_files_of_others_are_read(some, tmp_path, kind):
    path, rows = some
    dtype, way = WAYS[kind]
    other = tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file.create_dataset("latents", data=rows.astype(dtype), **way)
        file["labels"] = np.arange(64, dtype=np.int32) % 4
        file["amount"] = 64
        file["latent_size"] = 8
    x, y = Latents(path).sample(9, torch.Generator().manual_seed(3))
    same_x, same_y = Latents(str(other)).sample(9, torch.Generator().manual_seed(3))
    assert torch.allclose(x, same_x, rtol=2e-3, atol=1e-3)
    assert torch.equal(y, same_y)
    assert rows_in_place(other) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": 3}, "labels"),
        ({"amount": [64]}, "amount"),
        ({"latents": np.zeros((64, 8, 8, 8), np.int16)}, "int16"),
        ({"labels": np.full(64, -1)}, "from -1"),
        ({"latent_size": 4}, "latent_size"),
        ({"latents": None}, "no latents"),
    ],
)
def test_files_of_another_layout_are_refused(some, change, words):
    path, _ = some
    with h5py.File(path, "a") as file:
        for name, value in change.items():
            del file[name]
            if value is not None:
                file[name] = value
    with pytest.raises(InputError, match=words):
        Latents(path)


def test_a_transformer_trains_on_a_latent_file(some, tmp_path):
    "The loop takes the file like any data: guided, saved, resumed to the bit."
    path, rows = some
    network = {"name": "dit", "size": 8, "classes": 4}
    target = {"name": "guided", "w": 2.0}
    config = make_config(
        {
            "data": {"name": "latents", "path": path},
            "network": network | {"width": 32, "depth": 2, "heads": 2},
            "objective": {"name": "soflow", "lam": 0.75, "target": target},
            "steps": 6,
            "batch": 8,
            "checkpoint_every": 3,
        }
    )
    model, objective = assemble(config)
    data = law_of(config.data)
    for step in train(model, objective, data, config, out=tmp_path / "run"):
        if step.number == 3:
            shutil.copytree(tmp_path / "run", tmp_path / "half")
    run = resume_run(tmp_path / "half")
    data = law_of(config.data)
    other = list(train(run.model, objective, data, run.config, resume=run))[-1]
    assert step.number == other.number == 6
    for name, weight in step.ema.items():
        assert torch.equal(weight, other.ema[name])
    assert load_run(tmp_path / "run").model.net.options["width"] == 32
    x, y = law_of(config.data).sample(1000, torch.Generator().manual_seed(0))
    assert abs(x.mean() - SCALE * rows[:, :4].mean()) < 0.02
    assert set(y.tolist()) == {0, 1, 2, 3}


# -------------------------------------------------------------- pictures of all kinds
def levels_in(path, size):
    "The pixels of a square file as `read_picture` reads them, uint8."
    return ((read_picture(path, size) + 1) * 127.5).round().byte().permute(1, 2, 0)


LOSSLESS = [("png", {}), ("tiff", {}), ("webp", {"lossless": True})]


@pytest.mark.parametrize("kind, options", LOSSLESS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_stand_upright(tmp_path, kind, options, turn):
    "Written as a camera does that was held in another way, by Pillow's own inverse."
    picture = patchwork(8, 8)
    written = Image.new("RGB", (8, 8))
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    names = {2: 0, 3: 3, 4: 1, 5: 5, 7: 6}
    how = back.get(turn, names.get(turn))
    written = picture if turn == 1 else picture.transpose(Image.Transpose(how))
    note = Image.Exif()
    note[0x0112] = turn
    path = tmp_path / f"a.{kind}"
    written.save(path, exif=note, **options)
    assert np.array_equal(levels_in(path, 8), picture)


def test_a_note_that_is_damaged_turns_nothing(tmp_path):
    path = tmp_path / "a.jpg"
    patchwork(8, 8).save(path, exif=b"Exif\x00\x00II*\x00" + 20 * b"\xff")
    plain = tmp_path / "b.jpg"
    patchwork(8, 8).save(plain)
    assert torch.equal(levels_in(path, 8), levels_in(plain, 8))


def chunk(name, content):
    "A part of a PNG file."
    data = name + content
    return struct.pack(">I", len(content)) + data + struct.pack(">I", zlib.crc32(data))


def png(width, height, depth, kind, rows, *others):
    "A PNG file by its definition."
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *others, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def png_of_words(array, kind, *others):
    "A PNG of 16 bits: (height, width) for kind 0, with channels for 2, 4 and 6."
    height, width = array.shape[:2]
    lines = [b"\x00" + line.astype(">u2").tobytes() for line in array]
    return png(width, height, 16, kind, b"".join(lines), *others)


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_become_eight(tmp_path, kind, channels):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = np.repeat(ramp[:, :, None], channels, 2)
    if channels in (2, 4):
        pixels[:, :, -1] = 65535  # opaque
    (tmp_path / "a.png").write_bytes(png_of_words(pixels, kind))
    found = levels_in(tmp_path / "a.png", 8).float()
    assert (found - torch.tensor(ramp / 257.0)[:, :, None]).abs().max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_tiff_files_of_sixteen_bits(tmp_path, order, photometric):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, 8), (279, 128)]
    table = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        table += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    head = mark + struct.pack(order + "I", 136)
    path = tmp_path / "a.tif"
    path.write_bytes(head + ramp.astype(order + "u2").tobytes() + table + bytes(4))
    expected = ramp / 257.0
    if photometric == 0 and order == "<":
        expected = 255 - expected
    if photometric == 0 and order == ">":
        assert "cannot be read" in complaint(read_picture, path, 8)  # not by Pillow
        return
    found = levels_in(path, 8)[:, :, 0].double()
    assert (found - torch.tensor(expected)).abs().max() <= 0.51


def test_numbers_without_a_scale_are_refused(tmp_path):
    for kind in (np.float32, np.int32):
        Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / "a.tif")
        words = complaint(read_picture, tmp_path / "a.tif", 8)
        assert "convert it to 8 or 16 bits" in words


def test_what_is_transparent_is_white(tmp_path):
    "A red that nobody was meant to see, in every kind of transparency."
    red = (200, 0, 0)
    blue = (0, 0, 200)
    pixels = np.full((8, 8, 4), (*red, 0), np.uint8)
    pixels[4:] = (*blue, 255)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "rgba.png")
    picture.save(tmp_path / "rgba.webp", lossless=True)
    picture.save(tmp_path / "rgba.tiff")
    picture.convert("RGB").save(tmp_path / "key.png", transparency=red)
    table = picture.convert("RGB").convert(
        "P", palette=Image.Palette.ADAPTIVE, colors=2
    )
    where = table.getpixel((0, 0))
    table.save(tmp_path / "table.png", transparency=where)
    table.save(tmp_path / "table.gif", transparency=where)
    words = np.zeros((8, 8, 3)) + 257 * np.array(red)
    words[4:] = 257 * np.array(blue)
    key = chunk(b"tRNS", struct.pack(">HHH", *(257 * level for level in red)))
    (tmp_path / "words.png").write_bytes(png_of_words(words, 2, key))
    for path in sorted(tmp_path.iterdir()):
        found = levels_in(path, 8)
        assert (found[:4] == 255).all(), path.name
        assert (found[4:].float() - torch.tensor(blue)).abs().max() <= 1, path.name
    grey = np.full((8, 8), 7 * 257)
    grey[4:] = 100 * 257
    key = chunk(b"tRNS", struct.pack(">H", 7 * 257))
    (tmp_path / "grey.png").write_bytes(png_of_words(grey, 0, key))
    found = levels_in(tmp_path / "grey.png", 8)
    assert [found[0, 0, 0], found[7, 0, 0]] == [255, 100]


def test_strips_and_promises_of_size_take_little_memory(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 65_000).astype(np.uint8)[:, None], (1, 1))
    Image.fromarray(ramp).save(tmp_path / "strip.png")
    Image.fromarray(ramp.T.copy()).save(tmp_path / "lying.png")
    vast = png(100_000, 100_000, 8, 0, b"\x00" * 50)
    (tmp_path / "vast.png").write_bytes(vast)
    patchwork().save(tmp_path / "sound.jp2")
    content = bytearray((tmp_path / "sound.jp2").read_bytes())
    content[32] = 0x7F  # the length of a box, which becomes two gigabytes
    (tmp_path / "promising.jp2").write_bytes(content)

    def check():
        for name in ("strip.png", "lying.png"):
            x = read_picture(tmp_path / name, 256)
            assert x.shape == (3, 256, 256)
            assert x.mean().abs() < 0.02
        words = complaint(read_picture, tmp_path / "vast.png", 256)
        assert "100,000 x 100,000" in words or "decompression bomb" in words
        words = complaint(read_picture, tmp_path / "promising.jp2", 256)
        assert "cannot be read as a picture" in words

    assert within(check, 2**28) == ""


def test_what_is_no_picture_of_ours_is_left_out_in_words(tmp_path, capsys):
    root = tmp_path / "pets"
    patchwork().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    wanted = ["cat/1.JPG", "cat/2.tif", "cat/3.jfif", "cat/4.webp", "dog/old/5.Bmp"]
    junk = ["cat/@eaDir/1.JPG", "cat/.thumbnails/1.png", "cat/._1.JPG", "cat/Thumbs.db"]
    junk += ["__MACOSX/cat/1.jpg", "@eaDir/2.jpg", "#recycle/3.png", "dog/@EADIR/a.png"]
    others = ["cat/notes.txt", "dog/films.mp4", "dog/b.TXT", "cat/README", "6.png"]
    for name in wanted + junk + others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "dog/gone.png").symlink_to(root / "nothing.png")
    folder = image_folder(root)
    assert folder.files == wanted
    assert folder.classes == ["cat", "dog"]
    words = capsys.readouterr().out
    for count in ("2 .txt", "1 .mp4", "1 without ending", "1 broken link"):
        assert count in words
    assert "1 beside the folders of classes" in words
    assert words.count(str(root)) == 1
    image_folder(root)
    assert capsys.readouterr().out == ""  # said once


def test_linked_folders_are_followed_once(tmp_path):
    root = tmp_path / "pets"
    for name in ("pets/dog/1.png", "far/cats/2.png", "far/cats/old/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        patchwork().save(tmp_path / name)
    (root / "cat").symlink_to(tmp_path / "far/cats")
    (root / "dog/more").symlink_to(tmp_path / "far/cats/old")
    (root / "dog/again").symlink_to(root / "dog")
    (root / "dog/all").symlink_to(root)
    (root / "dog/up").symlink_to(tmp_path)
    folder = image_folder(root)
    assert folder.files == ["cat/2.png", "cat/old/3.png", "dog/1.png", "dog/more/3.png"]
    assert folder.labels == [0, 0, 1, 1]


def test_names_that_are_no_text(tmp_path):
    "Latin letters in a place where UTF-8 is expected, in files and folders."
    root = tmp_path / "images"
    folder = root / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    patchwork(64, 64).save(folder / "1.png")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    (folder / os.fsdecode(b"2.t\xfft")).write_bytes(b"no picture")
    options = ("--autoencoder", "blocks", "--size", "64")
    job = ("-m", "soflow_edu", "encode", root, tmp_path / "out")
    done = python(*job, *options, PYTHONUTF8="1")
    assert done.status == 2, done.said
    assert "Traceback" not in done.said
    assert r"caf\udce9/\udcff.png" in unwrapped(done.said)
    done = python(*job, *options, "--skip-broken", PYTHONUTF8="1")
    assert done.status == 0, done.said
    data = Latents(str(tmp_path / "out"))
    assert len(data) == 1
    assert data.names == (folder.name,)


# --------------------------------------------------------------- files of other people
@pytest.mark.parametrize("channels", [2, 4, 6, 16])
def test_latents_without_deviations_are_not_taken_for_others(tmp_path, channels):
    shape = (5, channels, 8, 8)
    path = foreign(tmp_path / "a.hdf5", np.ones(shape, np.float32))
    words = complaint(Latents, path)
    assert f"means alone of {channels}" in words
    path = foreign(tmp_path / "b.hdf5", np.ones(shape, "f4"), {"channels": channels})
    assert f"says channels = {channels}" in complaint(Latents, path)
    half = channels // 2
    path = foreign(tmp_path / "c.hdf5", np.ones(shape, "f4"), {"channels": half})
    assert Latents(path).channels == half
    own = new_latent_file(tmp_path / "d.hdf5", np.arange(5), 8, half)
    assert Latents(str(own)).channels == half


@pytest.mark.parametrize("how", [{}, {"compression": "gzip", "chunks": (1, 8, 8, 8)}])
@pytest.mark.parametrize("wrong", [-0.1, np.nan, np.inf])
def test_deviations_that_are_none_are_refused(tmp_path, how, wrong):
    "At once if the first row has them, else when the row is read."
    values = np.ones((9, 8, 8, 8), np.float32)
    values[:, :4] = -1  # means may be negative
    assert len(Latents(foreign(tmp_path / "a.hdf5", values, **how))) == 9
    late = values.copy()
    late[4, 7, 7, 7] = wrong
    data = Latents(foreign(tmp_path / "b.hdf5", late, **how))
    assert data[3][0].shape == (4, 8, 8)
    assert "standard deviation" in complaint(data.__getitem__, 4)
    values[0, 4, 0, 0] = wrong
    path = foreign(tmp_path / "c.hdf5", values, **how)
    assert "standard deviation" in complaint(Latents, path)


BAD_ATTRIBUTES = [
    {"classes": 1000},
    {"classes": "imagenet"},
    {"classes": '{"cat": 1}'},
    {"classes": "[1, 2]"},
    {"scale": np.full(4, 0.18)},
    {"scale": "0.18"},
    {"scale": 0.0},
    {"scale": np.nan},
    {"scale": True},
    {"autoencoder": 3},
]


@pytest.mark.parametrize("attributes", BAD_ATTRIBUTES, ids=str)
def test_attributes_of_another_kind_are_refused(tmp_path, attributes):
    path = foreign(tmp_path / "a.hdf5", np.ones((3, 8, 8, 8), "f4"), attributes)
    words = complaint(Latents, path)
    assert f"attribute {next(iter(attributes))} = " in words
    assert "del file.attrs" in words


def test_attributes_that_are_not_ours_do_no_harm(tmp_path):
    "Statistics, empty ones, objects; and names of classes as an array of text."
    kind = h5py.string_dtype()
    attributes = {"mean": np.zeros(4), "std": np.ones((2, 2)), "note": h5py.Empty("f")}
    attributes |= {"made": b"\xff by us", "complex": 1j, "scale": np.float32(0.5)}
    attributes["classes"] = np.array(["cat", "dog", "cow"], dtype=kind)
    path = foreign(tmp_path / "a.hdf5", np.ones((3, 8, 8, 8), "f4"), attributes)
    data = Latents(path)
    assert data.names == ("cat", "dog", "cow")
    assert data.scale == 0.5


def test_vast_files_are_refused_before_they_are_read(tmp_path):
    "Chunks that were never written, labels of many classes: in little memory."
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        shape = (10**9, 8, 8, 8)
        file.create_dataset("latents", shape, "f4", chunks=(1, 8, 8, 8))
        file.create_dataset("labels", shape[:1], "i8", chunks=(1000,))
        file["amount"] = 10**9
        file["latent_size"] = 8
    path = foreign(tmp_path / "b.hdf5", np.ones((3, 8, 8, 8), "f4"))
    with h5py.File(path, "a") as file:
        file["labels"][1] = 2**62

    def check():
        assert "but the file holds" in complaint(Latents, str(tmp_path / "a.hdf5"))
        assert "labels from 0 to 4611686018427387904" in complaint(Latents, path)

    assert within(check, 2**28) == ""
