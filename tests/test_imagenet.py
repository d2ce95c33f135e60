"""From latents to files of samples: ten classes as latents, decoders, sheets.

Many processes, killed and resumed; bad input."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from helpers import complaint
from soflow_edu import imagenet
from soflow_edu.config import alone, load_config, make_config
from soflow_edu.core import InputError, build, describe
from soflow_edu.distributions import law_of
from soflow_edu.imagenet import (
    imagenette,
    join_parts,
    sample_npz,
    scenes_folder,
    write_samples,
    write_sheet,
)
from soflow_edu.ladder import (
    changed,
    class_names,
    decoder_of,
    evaluate_run,
    map_of,
    sample_run,
    sampler_of,
)
from soflow_edu.latents import encode
from soflow_edu.metrics import as_uint8, read_npz
from soflow_edu.training import Run, assemble, load_run, save_run, train

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DIT = {"name": "dit", "size": 8, "patch": 4, "classes": 10}
DIT |= {"width": 16, "depth": 1, "heads": 2}
SCENES = {"name": "imagenette", "source": "rendered", "size": 64, "each": 3}
GUIDED = {"name": "soflow", "target": "guided"}
SETTINGS = {"data": SCENES, "network": DIT, "objective": GUIDED, "steps": 1, "batch": 4}


def awake(model):
    "The model with random numbers in all its weights."
    for p in model.parameters():
        g = torch.Generator().manual_seed(p.numel())
        p.data.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cache of its own, in which scenes of 64 pixels are kept as latents."
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def folder(home):
    "The folder of a run on rendered scenes; its weights are random."
    config = make_config(SETTINGS)
    model, objective = assemble(config)
    weights = awake(model).state_dict()
    ema = {name: value.clone() for name, value in weights.items()}
    counts = {"step": 1, "steps": 1}
    run = Run(model, config, ema, **counts, objective=describe(objective))
    return save_run(home / "run", run)


def sampling(folder, out, *options, launcher=()):
    "A process that samples."
    command = [sys.executable, *launcher, "-m", "soflow_edu", "sample", str(folder)]
    command += ["--npz", str(out), "--device", "cpu", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def samples_in(path):
    return np.load(path)["arr_0"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def times_of(paths):
    "When files were last written."
    return {path: path.stat().st_mtime_ns for path in paths}


def test_scenes_are_drawn_once_and_whole(tmp_path):
    root = scenes_folder(tmp_path / "scenes", {"train": 2, "val": 1})
    files = times_of(root.rglob("*.png"))
    assert len(files) == 30
    assert scenes_folder(root, {"train": 5}) == root
    assert times_of(root.rglob("*.png")) == files
    assert names_in(tmp_path) == ["scenes"]


def test_latents_of_ten_classes_are_kept_and_found_again(home, monkeypatch):
    data = imagenette("rendered", size=64, flip=True, each=3)
    x, y = data.sample(5, torch.Generator().manual_seed(0))
    assert x.shape == (5, 4, 8, 8)
    assert len(data.latents) == 60
    assert data.test.shape[1:] == (3, 64, 64)
    assert data.classes == 10
    assert data.names[0] == "ball"
    monkeypatch.setattr(imagenet, "read_picture", None)  # no picture is opened now
    monkeypatch.setattr("soflow_edu.latents.read_row", None)
    again = imagenette("rendered", size=64, flip=True, each=3)
    assert torch.equal(again.sample(5, torch.Generator().manual_seed(0))[0], x)


@pytest.fixture
def one_each(tmp_path, home):
    "A folder with one scene of each class in each part."
    return scenes_folder(tmp_path / "set", {"train": 1, "val": 1})


def latents_of(root):
    return imagenette(str(root), autoencoder="blocks", size=64)


def test_words_for_classes(one_each):
    table = one_each / "classes.csv"
    classes = sorted(path.name for path in (one_each / "train").iterdir())
    lines = ["wnid,name", *(f"{name},the {name}" for name in classes)]
    table.write_text("\n".join(lines) + "\n")
    data = latents_of(one_each)
    assert data.names[:2] == ("the ball", "the boat")
    assert data.features == ""  # the classifier knows other classes
    table.write_text("wnid,name\nball,a ball\n")
    with pytest.raises(InputError, match="no name for boat"):
        latents_of(one_each)
    table.unlink()
    (one_each / "val" / "ball").rename(one_each / "val" / "balls")
    with pytest.raises(InputError, match="other classes"):
        latents_of(one_each)


def test_photographs_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFLOW_DATA", str(tmp_path))
    with pytest.raises(InputError, match="source: rendered"):
        imagenette()


def test_decoders(folder, tmp_path):
    run = load_run(folder)
    z = torch.randn(3, 4, 8, 8)
    coder = build("autoencoder", "blocks")
    expected = coder.decode(z / coder.scale).clamp(-1, 1)
    assert torch.equal(decoder_of(run)(z), expected)
    run.config.data = {"name": "latents", "path": str(tmp_path / "none")}
    assert torch.equal(decoder_of(run, "blocks")(z), expected)
    with pytest.raises(InputError, match="latent"):
        decoder_of(run)
    numbers = [str(k) for k in range(10)]
    assert class_names(run) == numbers  # as the file is not there
    run.config.data = "digits"
    assert decoder_of(run)(4 * z).abs().max() == 1
    with pytest.raises(InputError, match="no latents"):
        decoder_of(run, "blocks")


def test_a_velocity_alone_is_sampled_by_euler_steps(folder):
    run = load_run(folder)
    assert sampler_of(run) == "renoise"
    one = torch.ones(1)
    x = map_of(run)(torch.zeros(1, 4, 8, 8), one, 0 * one, torch.zeros(1).long())
    assert x.shape == (1, 4, 8, 8)
    run.objective = run.objective | {"lam": 1.0}
    x = torch.randn(2, 4, 8, 8)
    t = torch.full((2,), 0.75)
    s = torch.full((2,), 0.25)
    y = torch.tensor([1, 2])
    assert sampler_of(run) == "jump"
    step = x - 0.5 * run.model.eval().velocity(x, t, y)
    torch.testing.assert_close(map_of(run)(x, t, s, y), step)


def test_samples_are_those_of_one_process_whoever_makes_them(folder, tmp_path):
    options = {"count": 11, "batch": 2, "seed": 3, "device": "cpu"}
    whole = sample_npz(folder, tmp_path / "whole.npz", **options)
    run = load_run(folder)
    pictures = decoder_of(run)
    batches = sample_run(run, **options)
    expected = as_uint8(torch.cat([pictures(x) for x, _ in batches]))
    assert torch.equal(read_npz(whole), expected)
    assert list(np.load(whole)) == ["arr_0"]
    assert names_in(tmp_path) == ["whole.npz"]


@pytest.mark.slow
def test_two_processes_share_the_work(folder, tmp_path):
    count = ("--count", "600")
    one = sampling(folder, tmp_path / "one.npz", *count)
    many = sampling(folder, tmp_path / "many.npz", *count, launcher=TORCHRUN)
    for job in (one, many):
        assert job.wait(300) == 0, job.stderr.read()
    found = samples_in(tmp_path / "many.npz")
    assert np.array_equal(found, samples_in(tmp_path / "one.npz"))
    assert "600 samples" in many.stdout.read()


@pytest.mark.slow
def test_sampling_survives_being_killed(folder, tmp_path):
    count = ("--count", "1500")
    whole = tmp_path / "whole.npz"
    killed = tmp_path / "killed.npz"
    assert sampling(folder, whole, *count, "--steps", "4").wait(300) == 0
    job = sampling(folder, killed, *count, "--steps", "4")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed.parts/part-*.npy")):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    made = times_of(tmp_path.glob("killed.parts/part-*.npy"))
    assert made
    assert not killed.exists()
    refused = sampling(folder, killed, *count, "--steps", "2")
    assert refused.wait(300) == 2
    assert "steps was 4 and is 2" in " ".join(refused.stderr.read().split())
    assert times_of(made) == made  # nothing was lost
    assert sampling(folder, killed, *count, "--steps", "4").wait(300) == 0
    assert np.array_equal(samples_in(whole), samples_in(killed))
    assert names_in(tmp_path) == ["killed.npz", "whole.npz"]


class Stopping:
    "Calls of functions of os, of which one ends the process."

    def __init__(self, stop):
        self.stop = stop
        self.calls = 0

    def replaced(self, real):
        def call(*given, **options):
            self.calls += 1
            if self.calls == self.stop + 1:
                raise KeyboardInterrupt
            return real(*given, **options)

        return call


@pytest.mark.parametrize("stop", range(8))
def test_sampling_goes_on_wherever_it_stopped(folder, tmp_path, monkeypatch, stop):
    """Ended before its first, second, ... replacement or removal, and called again.

    It gives the same file."""
    options = {"count": 6, "batch": 2, "device": "cpu"}
    whole = sample_npz(folder, tmp_path / "whole.npz", **options)
    path = tmp_path / "a.npz"
    stopping = Stopping(stop)
    for name in ("replace", "rmdir"):
        monkeypatch.setattr(os, name, stopping.replaced(getattr(os, name)))
    try:
        sample_npz(folder, path, **options)
    except KeyboardInterrupt:
        pass
    ended_early = stopping.calls == stop + 1
    monkeypatch.undo()
    if path.exists() and not (tmp_path / "a.parts").exists():
        with pytest.raises(InputError, match="exists already"):
            sample_npz(folder, path, **options)
    else:
        sample_npz(folder, path, **options)
    assert ended_early or stop > 5
    assert np.array_equal(samples_in(whole), samples_in(path))
    assert names_in(tmp_path) == ["a.npz", "whole.npz"]


def test_files_of_samples_are_not_overwritten(folder, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        sample_npz(folder, path, 4, device="cpu")
    assert path.read_bytes() == b"mine"
    assert not (tmp_path / "a.parts").exists()
    thesis = tmp_path / "mine.parts" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    with pytest.raises(InputError, match="thesis.txt"):
        sample_npz(folder, tmp_path / "mine.npz", 4, device="cpu")
    assert thesis.read_text() == "mine"


def test_what_cannot_be_sampled_is_refused_before_there_is_a_plan(folder, tmp_path):
    path = tmp_path / "d.npz"
    for wrong in ({"sampler": "renois"}, {"autoencoder": "blocs"}, {"steps": 0}):
        with pytest.raises(InputError):
            sample_npz(folder, path, 4, device="cpu", **wrong)
    assert sample_npz(folder, path, 4, device="cpu").is_file()
    with alone(tmp_path / "b.parts"):
        with pytest.raises(InputError, match="is being written by this process itself"):
            sample_npz(folder, tmp_path / "b.npz", 4, device="cpu")
    with pytest.raises(InputError, match=r"\.npz"):
        sample_npz(folder, tmp_path / "b.npy", 4)
    with pytest.raises(InputError, match="at least 1"):
        sample_npz(folder, tmp_path / "c.npz", 0)


def test_parts_are_joined_without_being_held(tmp_path):
    parts = {}
    arrays = []
    for k in range(3):
        numbers = np.random.default_rng(k)
        arrays.append(numbers.integers(0, 256, (k + 1, 4, 5, 3), np.uint8))
        np.save(tmp_path / f"{k}.npy", arrays[k])
        parts[tmp_path / f"{k}.npy"] = k + 1
    whole = np.concatenate(arrays)
    path = tmp_path / "all.npz"
    join_parts(path, parts)
    assert np.array_equal(samples_in(path), whole)
    assert torch.equal(read_npz(path), torch.from_numpy(whole))
    parts[tmp_path / "2.npy"] = 4
    assert "2.npy is damaged: 4 pictures" in complaint(join_parts, path, parts)


def test_a_sheet_has_a_column_for_each_class(folder, tmp_path):
    from matplotlib.image import imread

    run = load_run(folder)
    write_sheet(tmp_path / "sheet.png", run, 20, device="cpu")
    write_sheet(tmp_path / "few.png", run, 5, device="cpu")
    sheet = imread(tmp_path / "sheet.png")
    assert sheet.shape[1] > 10 * 64
    assert sheet.shape[0] > 2 * 64
    top = sheet[: sheet.shape[0] // 12, :, :3]
    assert (top.min(2) < 0.5).sum() > 100  # words stand above the pictures


def test_only_the_first_of_several_processes_writes_a_sheet(
    folder, tmp_path, monkeypatch
):
    "A process knows its rank once it has joined the others."
    joined = []

    def second_of_two():
        return len(joined), 2

    monkeypatch.setattr("soflow_edu.imagenet.join_processes", joined.append)
    monkeypatch.setattr("soflow_edu.imagenet.processes", second_of_two)
    path = tmp_path / "sheet.png"
    write_samples(folder, 3, 1, "", 0, "cpu", str(path), "")
    assert joined == ["cpu"]
    assert not path.exists()


def test_a_damaged_picture_is_named(one_each):
    (one_each / "val" / "cup" / "0000.png").write_bytes(b"no picture")
    data = latents_of(one_each)
    with pytest.raises(InputError, match="cup/0000.png"):
        len(data.test)


def test_changed_pictures_are_encoded_again(one_each):
    before = latents_of(one_each).latents.read([0])
    other = (one_each / "train" / "cup" / "0000.png").read_bytes()
    (one_each / "train" / "ball" / "0000.png").write_bytes(other)
    assert not torch.equal(latents_of(one_each).latents.read([0]), before)


@pytest.mark.slow
def test_agreement_is_part_of_an_evaluation(folder):
    found = evaluate_run(load_run(folder), count=40, device="cpu")
    assert 0 <= found.values["agreement"] <= 1
    assert found.options["features"] == "scenes"
    assert "agreement" in found.table


UNCONDITIONAL = (
    "network={name: unet, size: 8, channels: 4, width: 16, multipliers: [1],"
    " blocks: 1, attention: []}"
)
MISFITS = {
    "network.channels=3": "3, 8, 8",
    "network.size=16": "16",
    "network.classes=5": "classes",
    UNCONDITIONAL: "labels|classes",
}


@pytest.mark.parametrize("change", MISFITS)
def test_a_model_that_does_not_fit_its_data_is_refused_before_training(
    home, tmp_path, change
):
    config = changed(make_config(SETTINGS), [change])
    model, objective = assemble(config)
    data = law_of(config.data)
    with pytest.raises(InputError, match=MISFITS[change]):
        list(train(model, objective, data, config, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_published_rungs_are_the_published_settings():
    b4 = load_config("imagenet-b4")
    assert b4.steps == 400_000
    assert b4.batch == 256
    assert b4.learning_rate == 1e-4
    assert b4.betas == (0.9, 0.99)
    assert b4.ema == 0.9999
    target = {"name": "guided", "w": 3.0, "m": 0.25, "decay": 0.8, "drop": 0.1}
    assert b4.objective["target"] == target
    xl = load_config("imagenet-xl2")
    assert xl.steps == 1_200_000
    assert xl.objective["target"]["w"] == 2.0


@pytest.mark.parametrize("model", ["B/4", "B/2", "M/2", "L/2", "XL/2"])
def test_each_published_size_has_a_rung(model):
    rung = f"imagenet-{model.lower().replace('/', '')}"
    assert load_config(rung).network == {"name": "dit", "model": model}


def test_two_encodings_of_one_folder_share_nothing(one_each, home, tmp_path):
    for size in (64, 128):
        imagenette(str(one_each), autoencoder="blocks", size=size).prepare()
    kept = list((home / "soflow_edu" / "latents").glob("imagenette-*"))
    assert len(kept) >= 2
    path = encode(one_each / "val", tmp_path / "blocks", "blocks", size=64)
    assert re.search("blocks", str(path))
