"Latent files: killed and gone on with, written by several processes, by a diffusers autoencoder; copied, forked, trained on."
import copy
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from soflow_edu import latents
from soflow_edu.config import make_config
from soflow_edu.core import InputError, build
from soflow_edu.distributions import law_of
from soflow_edu.latents import LATENT_FILE, SCALE, Blocks, Latents, alone, centre_crop, decoder_of_latents, encode, image_folder, new_latent_file, open_autoencoder, read_picture, rows_in_place
from soflow_edu.training import assemble, load_run, resume_run, train

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def encoding(images, out, *options, launcher=()):
    "A process that encodes."
    return subprocess.Popen([sys.executable, *launcher, "-m", "soflow_edu", "encode", str(images), str(out), "--autoencoder", "blocks", "--size", "64", "--part", "3", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def again(images, out, **options): return encode(images, out, "blocks", size=64, part=3, **options)


def contents(out):
    "Data sets and attributes of a latent file."
    with h5py.File(Path(out) / LATENT_FILE) as file:
        return {name: part[()] for name, part in file.items()}, dict(file.attrs)


def same(a, b):
    (parts, about), (others, theirs) = contents(a), contents(b)
    return parts.keys() == others.keys() and about == theirs and all(np.array_equal(parts[name], others[name]) and parts[name].dtype == others[name].dtype for name in parts)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Twenty noisy pictures of several sizes in two classes, and what one uninterrupted call makes of them."
    root, numbers = tmp_path_factory.mktemp("pictures") / "images", np.random.default_rng(0)
    for k in range(20):
        path = root / ("cat", "dog")[k % 3 == 0] / f"{k:02d}.{('png', 'JPEG')[k % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (70 + 9 * k, 200 - 5 * k, 3), np.uint8)).save(path)
    again(root, root.parent / "whole", flip=True)
    return root


def test_rows_are_those_of_the_autoencoder(images):
    parts, attributes = contents(images.parent / "whole")
    folder = image_folder(images)
    for k, (name, label) in enumerate(zip(folder.files, folder.labels)):
        x = read_picture(images / name, 64)[None]
        for row, picture in ((k, x), (20 + k, x.flip(3))):
            np.testing.assert_allclose(parts["latents"][row], torch.cat(Blocks().encode(picture), 1)[0], rtol=1e-5, atol=1e-5)
            assert parts["labels"][row] == label and folder.classes[label] == Path(name).parent.name
    assert {name: part.dtype.str for name, part in parts.items()} == {"latents": "<f4", "labels": "<i8", "amount": "<i8", "latent_size": "<i8"} and parts["latents"].shape == (40, 8, 8, 8)
    assert attributes == {"autoencoder": "blocks", "size": 64, "classes": '["cat", "dog"]', "scale": SCALE}


def test_the_decoder_is_that_of_the_file(images, tmp_path):
    shutil.copytree(images.parent / "whole", tmp_path / "whole")
    data, coder, z = {"name": "latents", "path": str(tmp_path / "whole")}, Blocks(), torch.randn(2, 4, 8, 8)
    assert torch.equal(decoder_of_latents(data)(z), coder.decode(z / coder.scale).clamp(-1, 1))
    with h5py.File(tmp_path / "whole" / LATENT_FILE, "a") as file: del file.attrs["autoencoder"]
    with pytest.raises(InputError, match="do not say by which autoencoder"): decoder_of_latents(data)
    assert torch.equal(decoder_of_latents(data, "blocks")(z), coder.decode(z / coder.scale).clamp(-1, 1))


@pytest.mark.parametrize("edges", [(600, 1000), (1000, 600), (513, 700), (90, 200), (64, 64)])
@pytest.mark.parametrize("size", [64, 256])
def test_the_crop_is_that_of_adm(edges, size):
    "Halving boxes, cubic interpolation, the middle: written from the description, with arrays."
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*edges, 3), np.uint8))
    given = picture
    while min(given.size) >= 2 * size: given = given.resize((given.width // 2, given.height // 2), Image.BOX)
    ratio = size / min(given.size)
    pixels = np.array(given.resize((round(given.width * ratio), round(given.height * ratio)), Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    assert np.array_equal(np.array(centre_crop(picture, size)), pixels[top:top + size, left:left + size])


KILLED_EVERYWHERE = '''
import os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from soflow_edu import latents
root, home, broken = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "broken"
OPERATIONS = ("replace", "mkdir", "unlink", "rmdir", "pwrite", "posix_fallocate", "fsync")

def attempt(out, last):                   # in a child that dies at its operation number `last`
    child = os.fork()
    if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = [0]
    def counted(real):
        def call(*args, **options):
            count[0] += 1
            if count[0] == last: os._exit(9)
            return real(*args, **options)
        return call
    for name in OPERATIONS: setattr(os, name, counted(getattr(os, name)))
    try: latents.encode(root, out, "blocks", size=16, part=2, workers=1, skip_broken=broken)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)

assert attempt(home / "whole", -1) == 0
for last in range(1, 1000):
    out = home / str(last)
    code = attempt(out, last)
    assert code in (0, 9), (last, code)
    assert attempt(out, -1) == 0, last
    left = sorted(path.name for path in out.iterdir())
    assert left == [latents.LATENT_FILE] + ["unreadable.csv"] * broken, (last, left)
    assert (out / latents.LATENT_FILE).read_bytes() == (home / "whole" / latents.LATENT_FILE).read_bytes(), last
    shutil.rmtree(out)
    if code == 0: break
print(last)
'''


@pytest.mark.parametrize("kind", ["sound", "broken"])
def test_a_kill_after_any_operation_on_files_loses_nothing(images, tmp_path, kind):
    "The process ends for good at its first, second, third, ... operation; the next call makes the file of an uninterrupted one, to the byte."
    for k in range(5):
        (tmp_path / f"images/{'ab'[k % 2]}").mkdir(parents=True, exist_ok=True)
        shutil.copy(images / image_folder(images).files[k], tmp_path / f"images/{'ab'[k % 2]}/{k}.png")
    if kind == "broken": (tmp_path / "images/a/2.png").write_text("no picture")
    done = subprocess.run([sys.executable, "-c", KILLED_EVERYWHERE, tmp_path / "images", tmp_path / "out", kind], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 15         # so many places were tried


def test_killed_for_good_again_and_again(images, tmp_path):
    moments, kills = random.Random(0), 0
    while not (tmp_path / LATENT_FILE).exists():
        job, marks, deadline = encoding(images, tmp_path, "--flip"), len(list(tmp_path.glob("encoding/part-*"))), time.time() + 120
        while job.poll() is None and len(list(tmp_path.glob("encoding/part-*"))) < marks + 3 and time.time() < deadline: time.sleep(0.001)
        time.sleep(0.01 * moments.random())
        if job.poll() is None:
            job.kill()
            kills += 1
        said = job.communicate()
        assert job.returncode in (0, -signal.SIGKILL), said
    again(images, tmp_path, flip=True)          # the last kill may have come after the file was moved
    assert kills >= 2 and same(tmp_path, images.parent / "whole") and not (tmp_path / "encoding").exists()


def test_what_is_done_is_not_done_again(images, tmp_path, monkeypatch):
    "After a stop only the parts without a mark are encoded; a damaged mark is no mark."
    calls, real = [], Blocks.encode
    def stopping(self, x):
        calls.append(len(x))
        if len(calls) == 4: raise KeyboardInterrupt
        return real(self, x)
    monkeypatch.setattr(Blocks, "encode", stopping)
    with pytest.raises(KeyboardInterrupt): again(images, tmp_path)
    marks = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "encoding").glob("part-*")}
    assert len(marks) == 3
    (tmp_path / "encoding/part-0000001.json").write_text('{"0": ')
    calls[:] = [0] * 10
    again(images, tmp_path)
    assert len(calls) - 10 == 7 - 2 and np.array_equal(contents(tmp_path)[0]["latents"], contents(images.parent / "whole")[0]["latents"][:20])


def test_two_processes_write_the_same_file(images, tmp_path):
    "Each its own parts; the second call is told that there is nothing to do; an error is said once, without a traceback."
    job = encoding(images, tmp_path, "--flip", launcher=TORCHRUN)
    said = job.communicate()
    assert job.returncode == 0 and said[0].count("Written to") == 1, said
    assert same(tmp_path, images.parent / "whole") and [path.name for path in tmp_path.iterdir()] == [LATENT_FILE]
    job = encoding(images, tmp_path, "--size", "128", launcher=TORCHRUN)
    said = job.communicate()
    assert job.returncode != 0 and said[1].count("soflow:") == 1 and "exists already" in " ".join(said[1].split()) and "Connection closed" not in said[1], said[1]


def test_the_second_process_does_its_share(images, tmp_path):
    "With the first one absent its parts stay open, and those of the second are done."
    folder = image_folder(images)
    plan = latents.Plan(str(images.resolve()), folder.files, folder.labels, folder.classes, "blocks", 64, False, 3)
    assert latents.begin_encoding(plan, Blocks(), tmp_path)
    rows = rows_in_place(tmp_path / "encoding/rows.hdf5")
    latents.fill(plan, Blocks(), tmp_path / "encoding", [1, 3, 5], rows, 16, 2, False)
    assert sorted(path.name[-6] for path in tmp_path.glob("encoding/part-*")) == ["1", "3", "5"]
    with pytest.raises(InputError, match="still being written: 3 of 7 parts"): Latents(str(tmp_path))
    for hidden in (tmp_path / "encoding", tmp_path / "encoding/rows.hdf5"):
        with pytest.raises(InputError, match="still being written|is missing"): Latents(str(hidden))
    again(images, tmp_path)
    assert np.array_equal(contents(tmp_path)[0]["latents"], contents(images.parent / "whole")[0]["latents"][:20])


def test_a_second_call_beside_a_living_one_is_refused(images, tmp_path):
    with alone(tmp_path):
        job = encoding(images, tmp_path)
        assert "Another call is writing" in " ".join(job.communicate()[1].split()) and job.returncode == 2
    again(images, tmp_path)


def test_pictures_that_cannot_be_read_are_listed_and_left_out_when_asked(images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    files = image_folder(root).files
    for name in (files[4], files[15]): (root / name).write_bytes((root / name).read_bytes()[:300])
    job = encoding(root, tmp_path / "out")
    words = " ".join(job.communicate()[1].split())
    assert job.returncode == 2 and "Traceback" not in words and f"2 of 20 pictures cannot be read: {files[4]}" in words and "--skip-broken" in words, words
    assert (tmp_path / "out/unreadable.csv").read_text().count("\n") == 3 and not (tmp_path / "out" / LATENT_FILE).exists()
    (root / files[4]).unlink()                                            # removed, as the message proposes
    shutil.copy(images / files[15], root / files[15])                     # mended
    again(root, tmp_path / "out", skip_broken=True)
    parts, whole = contents(tmp_path / "out")[0], contents(images.parent / "whole")[0]
    kept = [k for k in range(20) if k != 4]
    assert parts["amount"] == 19 and np.array_equal(parts["latents"], whole["latents"][kept]) and np.array_equal(parts["labels"], whole["labels"][kept])
    assert (tmp_path / "out/unreadable.csv").read_text().count("\n") == 2
    again(images, tmp_path / "sound")
    assert not (tmp_path / "sound/unreadable.csv").exists()


def test_a_disk_that_fails_is_not_a_broken_picture(images, tmp_path, monkeypatch):
    def failing(path, size): raise OSError(5, "Input/output error", str(path))
    monkeypatch.setattr(latents, "read_picture", failing)
    with pytest.raises(OSError, match="Input/output error"): again(images, tmp_path, skip_broken=True)


def test_a_full_disk_is_noticed_before_anything_is_encoded(images, tmp_path, monkeypatch):
    def full(handle, start, size): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(Blocks, "encode", lambda self, x: pytest.fail("encoded"))
    with pytest.raises(InputError, match="GB, which the disk does not have .No space left"): again(images, tmp_path)


def test_other_settings_do_not_go_on_with_unfinished_work(images, tmp_path, monkeypatch):
    real = Blocks.encode
    monkeypatch.setattr(Blocks, "encode", lambda self, x: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): again(images, tmp_path)
    with pytest.raises(InputError, match="flip is False, not True; part is 3, not 4"): encode(images, tmp_path, "blocks", size=64, part=4, flip=True)
    more = tmp_path / "more"
    shutil.copytree(images, more)
    monkeypatch.setattr(Blocks, "encode", real)
    (tmp_path / "encoding/plan.json").write_text((tmp_path / "encoding/plan.json").read_text().replace(str(images.resolve()), str(more.resolve())))
    shutil.copy(more / "cat/01.JPEG", more / "cat/99.JPEG")
    with pytest.raises(InputError, match="1 pictures are new: cat/99.JPEG"): again(more, tmp_path)
    (tmp_path / "encoding/plan.json").write_text("{")
    with pytest.raises(InputError, match="plan.json is damaged"): again(more, tmp_path)


def test_an_autoencoder_of_diffusers_is_read_from_a_folder(images, tmp_path):
    "One of random weights, as the hub's is laid out: mean, standard deviation and scale are those of diffusers."
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    net = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=4 * ("DownEncoderBlock2D",), up_block_types=4 * ("UpDecoderBlock2D",), norm_num_groups=4, latent_channels=4, scaling_factor=0.13).eval()
    net.save_pretrained(tmp_path / "vae")
    coder, x = open_autoencoder(tmp_path / "vae", "cpu"), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad(): law, back = net.encode(x).latent_dist, net.decode(torch.ones(1, 4, 8, 8)).sample
    mean, std = coder.encode(x)
    for ours, theirs in ((mean, law.mean), (std, law.std), (coder.decode(torch.ones(1, 4, 8, 8)), back)): torch.testing.assert_close(ours, theirs)
    data = Latents(str(encode(images, tmp_path / "out", str(tmp_path / "vae"), size=64, device="cpu")))
    assert coder.factor == 8 and (std > 0).all() and data.scale == 0.13 and data.read(range(20))[:, 4:].min() > 0
    for name in ("sd-vae-ft-mse", tmp_path):
        with pytest.raises(InputError, match="could not be loaded"): open_autoencoder(name, "cpu")


@pytest.fixture
def some(tmp_path):
    "A file of 64 latents of size 8 in 4 classes: its path, and the numbers in it."
    rows = np.random.default_rng(0).normal(size=(64, 8, 8, 8)).astype(np.float32)**2
    rows_in_place(new_latent_file(tmp_path / "some.hdf5", np.arange(64) % 4, 8)).write(0, rows)
    return str(tmp_path / "some.hdf5"), rows


def test_it_can_be_copied_pickled_forked_and_loaded_by_workers(some):
    path, rows = some
    data = Latents(path)
    data.sample(16, torch.Generator())                       # threads and the file are open now
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))): assert np.array_equal(other.read([3, 1]), rows[[3, 1]])
    child = os.fork()
    if not child: os._exit(0 if np.array_equal(data.read(np.arange(64)), rows) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for start in ("fork", "spawn"):
        batches = list(torch.utils.data.DataLoader(data, 16, num_workers=2, multiprocessing_context=start))
        assert sum(len(y) for _, y in batches) == 64 and batches[0][0].shape == (16, 4, 8, 8) and torch.equal(torch.cat([y for _, y in batches]), data.labels)
    with pytest.raises(IndexError, match="0 to 63"): data.read([64])
    with pytest.raises(InputError, match="threads is 0"): build("pictures", {"name": "latents", "path": path, "threads": 0})


@pytest.mark.parametrize("kind", ["chunked", "half"])
def test_files_of_others_are_read(some, tmp_path, kind):
    path, rows = some
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_dataset("latents", data=rows.astype(np.float16 if kind == "half" else np.float32), **({"chunks": (4, 8, 8, 8), "compression": "gzip"} if kind == "chunked" else {}))
        for name, value in {"labels": np.arange(64, dtype=np.int32) % 4, "amount": 64, "latent_size": 8}.items(): file[name] = value
    a, b = (Latents(str(p)).sample(9, torch.Generator().manual_seed(3)) for p in (path, tmp_path / "other.hdf5"))
    assert torch.allclose(a[0], b[0], rtol=2e-3, atol=1e-3) and torch.equal(a[1], b[1]) and rows_in_place(tmp_path / "other.hdf5") is None


@pytest.mark.parametrize("change, words", [({"labels": 3}, "labels"), ({"amount": [64]}, "amount"), ({"latents": np.zeros((64, 8, 8, 8), np.int16)}, "int16"), ({"labels": np.full(64, -1)}, "from -1"), ({"latent_size": 4}, "latent_size"), ({"latents": None}, "no latents")])
def test_files_of_another_layout_are_refused(some, change, words):
    path, _ = some
    with h5py.File(path, "a") as file:
        for name, value in change.items():
            del file[name]
            if value is not None: file[name] = value
    with pytest.raises(InputError, match=words): Latents(path)


def test_a_transformer_trains_on_a_latent_file(some, tmp_path):
    "The loop takes the file like any data: guided, saved, resumed to the bit."
    path, rows = some
    config = make_config({"steps": 6, "batch": 8, "data": {"name": "latents", "path": path}, "network": {"name": "dit", "size": 8, "width": 32, "depth": 2, "heads": 2, "classes": 4}, "checkpoint_every": 3,
                          "objective": {"name": "soflow", "lam": 0.75, "target": {"name": "guided", "w": 2.0}}})
    model, objective = assemble(config)
    for step in train(model, objective, law_of(config.data), config, out=tmp_path / "run"):
        if step.number == 3: shutil.copytree(tmp_path / "run", tmp_path / "half")
    run = resume_run(tmp_path / "half")
    for other in train(run.model, objective, law_of(config.data), run.config, resume=run): pass
    assert step.number == other.number == 6 and all(torch.equal(step.ema[name], other.ema[name]) for name in step.ema)
    assert load_run(tmp_path / "run").model.net.options["width"] == 32
    x, y = law_of(config.data).sample(1000, torch.Generator().manual_seed(0))
    assert abs(x.mean() - SCALE * rows[:, :4].mean()) < 0.02 and set(y.tolist()) == {0, 1, 2, 3}
