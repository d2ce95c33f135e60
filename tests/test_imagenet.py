"From latents to files of samples: ten classes as latents, decoders, sheets; many processes, killed and gone on with; bad input."
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from soflow_edu import imagenet
from soflow_edu.config import load_config, make_config
from soflow_edu.core import InputError, build, describe
from soflow_edu.distributions import law_of
from soflow_edu.imagenet import imagenette, join_parts, sample_npz, scenes_folder, write_samples, write_sheet
from soflow_edu.ladder import changed, class_names, decoder_of, evaluate_run, map_of, sample_run, sampler_of
from soflow_edu.latents import alone, encode
from soflow_edu.metrics import as_uint8, read_npz
from soflow_edu.training import Run, assemble, load_run, save_run, train

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DIT = {"name": "dit", "size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "classes": 10}


def awake(model):
    for p in model.parameters(): p.data.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cache of its own, in which scenes of 64 pixels are kept as latents."
    folder = tmp_path_factory.mktemp("home")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None: del os.environ["XDG_CACHE_HOME"]
    else: os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def folder(home):
    "The folder of a run on rendered scenes; its weights are random."
    config = make_config({"data": {"name": "imagenette", "source": "rendered", "size": 64, "each": 3}, "network": DIT, "objective": {"name": "soflow", "target": "guided"}, "steps": 1, "batch": 4})
    model, objective = assemble(config)
    return save_run(home / "run", Run(awake(model), config, {name: value.clone() for name, value in model.state_dict().items()}, step=1, steps=1, objective=describe(objective)))


def sampling(folder, out, *options, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, "-m", "soflow_edu", "sample", str(folder), "--npz", str(out), "--device", "cpu", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_scenes_are_drawn_once_and_whole(tmp_path):
    root = scenes_folder(tmp_path / "scenes", {"train": 2, "val": 1})
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert len(files) == 30 and scenes_folder(root, {"train": 5}) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.png")} == files and sorted(path.name for path in tmp_path.iterdir()) == ["scenes"]


def test_latents_of_ten_classes_are_kept_and_found_again(home, monkeypatch):
    data = imagenette("rendered", size=64, flip=True, each=3)
    x, y = data.sample(5, torch.Generator().manual_seed(0))
    assert x.shape == (5, 4, 8, 8) and len(data.latents) == 60 and data.test.shape[1:] == (3, 64, 64) and data.classes == 10 and data.names[0] == "ball"
    monkeypatch.setattr(imagenet, "read_picture", None)                                   # the second time no picture is opened
    monkeypatch.setattr("soflow_edu.latents.read_row", None)
    again = imagenette("rendered", size=64, flip=True, each=3)
    assert torch.equal(again.sample(5, torch.Generator().manual_seed(0))[0], x)


def test_words_for_classes(tmp_path, home):
    root = scenes_folder(tmp_path / "set", {"train": 1, "val": 1})
    (root / "classes.csv").write_text("wnid,name\n" + "".join(f"{name},the {name}\n" for name in sorted(path.name for path in (root / "train").iterdir())))
    data = imagenette(str(root), autoencoder="blocks", size=64)
    assert data.names[:2] == ("the ball", "the boat") and data.features == ""                # the classifier knows other classes
    (root / "classes.csv").write_text("wnid,name\nball,a ball\n")
    with pytest.raises(InputError, match="no name for boat"): imagenette(str(root), autoencoder="blocks", size=64)
    (root / "classes.csv").unlink()
    (root / "val" / "ball").rename(root / "val" / "balls")
    with pytest.raises(InputError, match="other classes"): imagenette(str(root), autoencoder="blocks", size=64)


def test_photographs_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFLOW_DATA", str(tmp_path))
    with pytest.raises(InputError, match="source: rendered"): imagenette()


def test_decoders(folder, tmp_path):
    run = load_run(folder)
    z = torch.randn(3, 4, 8, 8)
    coder = build("autoencoder", "blocks")
    assert torch.equal(decoder_of(run)(z), coder.decode(z / coder.scale).clamp(-1, 1))
    run.config.data = {"name": "latents", "path": str(tmp_path / "none")}
    assert torch.equal(decoder_of(run, "blocks")(z), coder.decode(z / coder.scale).clamp(-1, 1))
    with pytest.raises(InputError, match="latent"): decoder_of(run)
    assert class_names(run) == [str(k) for k in range(10)]                                 # numbers, as the file is not there
    run.config.data = "digits"
    assert decoder_of(run)(4 * z).abs().max() == 1
    with pytest.raises(InputError, match="no latents"): decoder_of(run, "blocks")


def test_a_velocity_alone_is_sampled_by_euler_steps(folder):
    run = load_run(folder)
    assert sampler_of(run) == "renoise" and map_of(run)(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1), torch.zeros(1).long()).shape == (1, 4, 8, 8)
    run.objective = run.objective | {"lam": 1.0}
    x, t, s, y = torch.randn(2, 4, 8, 8), torch.full((2,), 0.75), torch.full((2,), 0.25), torch.tensor([1, 2])
    assert sampler_of(run) == "jump"
    torch.testing.assert_close(map_of(run)(x, t, s, y), x - 0.5 * run.model.eval().velocity(x, t, y))


def test_samples_are_those_of_one_process_whoever_makes_them(folder, tmp_path):
    whole = sample_npz(folder, tmp_path / "whole.npz", 11, batch=2, seed=3, device="cpu")
    pictures = decoder_of(load_run(folder))
    expected = as_uint8(torch.cat([pictures(x) for x, _ in sample_run(load_run(folder), 11, seed=3, batch=2, device="cpu")]))
    assert torch.equal(read_npz(whole), expected) and list(np.load(whole)) == ["arr_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.npz"]
    one = sampling(folder, tmp_path / "one.npz", "--count", "600")
    many = sampling(folder, tmp_path / "many.npz", "--count", "600", launcher=TORCHRUN)
    for job in (one, many): assert job.wait(300) == 0, job.stderr.read()
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "many"))) and "600 samples" in many.stdout.read()


def test_sampling_survives_being_killed(folder, tmp_path):
    options = ("--count", "1500", "--steps", "4")
    assert sampling(folder, tmp_path / "whole.npz", *options).wait(300) == 0
    job = sampling(folder, tmp_path / "killed.npz", *options)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed.parts/part-*.npy")) and time.monotonic() < deadline: time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed.parts/part-*.npy")}
    assert made and not (tmp_path / "killed.npz").exists()
    refused = sampling(folder, tmp_path / "killed.npz", "--count", "1500", "--steps", "2")
    assert refused.wait(300) == 2 and "steps was 4 and is 2" in " ".join(refused.stderr.read().split())
    assert {path: path.stat().st_mtime_ns for path in made} == made                       # nothing was lost
    assert sampling(folder, tmp_path / "killed.npz", *options).wait(300) == 0
    assert (tmp_path / "killed.npz").read_bytes() and np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("whole", "killed")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.npz", "whole.npz"]


@pytest.mark.parametrize("stop", range(8))
def test_sampling_goes_on_wherever_it_stopped(folder, tmp_path, monkeypatch, stop):
    "Ended before its first, second, ... replacement or removal, and called again, it gives the same file."
    whole, calls = sample_npz(folder, tmp_path / "whole.npz", 6, batch=2, device="cpu"), []
    for name in ("replace", "rmdir"):
        def ended(*given, real=getattr(os, name), **options):
            calls.append(given)
            if len(calls) == stop + 1: raise KeyboardInterrupt
            return real(*given, **options)
        monkeypatch.setattr(os, name, ended)
    try: sample_npz(folder, tmp_path / "a.npz", 6, batch=2, device="cpu")
    except KeyboardInterrupt: pass
    ended_early = len(calls) == stop + 1
    monkeypatch.undo()
    if (tmp_path / "a.npz").exists() and not (tmp_path / "a.parts").exists():
        with pytest.raises(InputError, match="exists already"): sample_npz(folder, tmp_path / "a.npz", 6, batch=2, device="cpu")
    else: sample_npz(folder, tmp_path / "a.npz", 6, batch=2, device="cpu")
    assert (ended_early or stop > 5) and np.array_equal(*(np.load(path)["arr_0"] for path in (whole, tmp_path / "a.npz")))
    assert [path.name for path in sorted(tmp_path.glob("*"))] == ["a.npz", "whole.npz"]


def test_files_of_samples_are_not_overwritten(folder, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"): sample_npz(folder, path, 4, device="cpu")
    assert path.read_bytes() == b"mine" and not (tmp_path / "a.parts").exists()
    (tmp_path / "mine.parts").mkdir()
    (tmp_path / "mine.parts" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="thesis.txt"): sample_npz(folder, tmp_path / "mine.npz", 4, device="cpu")
    assert (tmp_path / "mine.parts" / "thesis.txt").read_text() == "mine"
    for wrong in ({"sampler": "renois"}, {"autoencoder": "blocs"}, {"steps": 0}):              # refused before there is a plan
        with pytest.raises(InputError): sample_npz(folder, tmp_path / "d.npz", 4, device="cpu", **wrong)
    assert sample_npz(folder, tmp_path / "d.npz", 4, device="cpu").is_file()
    with alone(tmp_path / "b.parts"), pytest.raises(InputError, match="Another call"): sample_npz(folder, tmp_path / "b.npz", 4, device="cpu")
    with pytest.raises(InputError, match=r"\.npz"): sample_npz(folder, tmp_path / "b.npy", 4)
    with pytest.raises(InputError, match="at least 1"): sample_npz(folder, tmp_path / "c.npz", 0)


def test_parts_are_joined_without_being_held(tmp_path):
    parts = [tmp_path / f"{k}.npy" for k in range(3)]
    arrays = [np.random.default_rng(k).integers(0, 256, (k + 1, 4, 5, 3), np.uint8) for k in range(3)]
    for path, array in zip(parts, arrays): np.save(path, array)
    join_parts(tmp_path / "all.npz", parts)
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], np.concatenate(arrays)) and torch.equal(read_npz(tmp_path / "all.npz"), torch.from_numpy(np.concatenate(arrays)))


def test_a_sheet_has_a_column_for_each_class(folder, tmp_path):
    from matplotlib.image import imread
    write_sheet(tmp_path / "sheet.png", load_run(folder), 20, device="cpu")
    write_sheet(tmp_path / "few.png", load_run(folder), 5, device="cpu")
    sheet, columns = imread(tmp_path / "sheet.png"), 10
    assert sheet.shape[1] > columns * 64 and sheet.shape[0] > 2 * 64
    top = sheet[:sheet.shape[0] // 12, :, :3]
    assert (top.min(2) < 0.5).sum() > 100                                                  # words stand above the pictures


def test_only_the_first_of_several_processes_writes_a_sheet(folder, tmp_path, monkeypatch):
    "A process knows its rank once it has joined the others."
    joined = []
    monkeypatch.setattr("soflow_edu.imagenet.join_processes", joined.append)
    monkeypatch.setattr("soflow_edu.imagenet.processes", lambda: (len(joined), 2))
    write_samples(folder, 3, 1, "", 0, "cpu", str(tmp_path / "sheet.png"), "")
    assert joined == ["cpu"] and not (tmp_path / "sheet.png").exists()


def test_a_damaged_picture_is_named(tmp_path, home):
    root = scenes_folder(tmp_path / "set", {"train": 1, "val": 1})
    (root / "val" / "cup" / "0000.png").write_bytes(b"no picture")
    data = imagenette(str(root), autoencoder="blocks", size=64)
    with pytest.raises(InputError, match="cup/0000.png"): data.test


def test_changed_pictures_are_encoded_again(tmp_path, home):
    root = scenes_folder(tmp_path / "set", {"train": 1, "val": 1})
    before = imagenette(str(root), autoencoder="blocks", size=64).latents.read([0])
    path = root / "train" / "ball" / "0000.png"
    path.write_bytes((root / "train" / "cup" / "0000.png").read_bytes())
    assert not torch.equal(imagenette(str(root), autoencoder="blocks", size=64).latents.read([0]), before)


def test_agreement_is_part_of_an_evaluation(folder):
    found = evaluate_run(load_run(folder), count=40, device="cpu")
    assert 0 <= found.values["agreement"] <= 1 and found.options["features"] == "scenes" and "agreement" in found.table


def test_a_model_that_does_not_fit_its_data_is_refused_before_training(home, tmp_path):
    base = {"data": {"name": "imagenette", "source": "rendered", "size": 64, "each": 3}, "network": DIT, "objective": {"name": "soflow", "target": "guided"}, "steps": 1, "batch": 4}
    for changes, words in ((["network.channels=3"], "3, 8, 8"), (["network.size=16"], "16"), (["network.classes=5"], "classes"), (["network={name: unet, size: 8, channels: 4, width: 16, multipliers: [1], blocks: 1, attention: []}"], "labels|classes")):
        config = changed(make_config(base), changes)
        model, objective = assemble(config)
        with pytest.raises(InputError, match=words): list(train(model, objective, law_of(config.data), config, out=tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_published_rungs_are_the_published_settings():
    b4, xl = load_config("imagenet-b4"), load_config("imagenet-xl2")
    assert (b4.steps, b4.batch, b4.learning_rate, b4.betas, b4.ema) == (400_000, 256, 1e-4, (0.9, 0.99), 0.9999) and xl.steps == 1_200_000
    assert b4.objective["target"] == {"name": "guided", "w": 3.0, "m": 0.25, "decay": 0.8, "drop": 0.1} and xl.objective["target"]["w"] == 2.0
    for name, model in (("b4", "B/4"), ("b2", "B/2"), ("m2", "M/2"), ("l2", "L/2"), ("xl2", "XL/2")): assert load_config(f"imagenet-{name}").network == {"name": "dit", "model": model}


def test_two_encodings_of_one_folder_share_nothing(tmp_path, home):
    root = scenes_folder(tmp_path / "set", {"train": 1, "val": 1})
    for size in (64, 128): imagenette(str(root), autoencoder="blocks", size=size).prepare()
    assert len(list((home / "soflow_edu" / "latents").glob("imagenette-*"))) >= 2
    assert re.search("blocks", str(encode(root / "val", tmp_path / "blocks", "blocks", size=64)))
