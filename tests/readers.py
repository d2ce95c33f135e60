"Every kind of file that the package reads: a sound one, and what reads it."

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

import hostile
from helpers import PARITY, train_to_end
from soflow_edu import grading, imagenet, latents, objectives, published, widgets
from soflow_edu.cifar10 import (
    export_weights,
    load_weights,
    parquet_tables,
    read_table,
    rendered_table,
)
from soflow_edu.config import load_config, make_config, shipped_configs
from soflow_edu.core import InputError
from soflow_edu.distributions import law_of
from soflow_edu.metrics import read_arrays, read_npz
from soflow_edu.published import model_of, read_checkpoint, read_numbers
from soflow_edu.training import assemble, begin, load_run, resume_run, save_run

TINY = {"name": "mlp", "width": 8, "depth": 2, "x_waves": 1, "t_waves": 1}
UNET = {
    "name": "unet",
    "width": 8,
    "multipliers": [1],
    "blocks": 1,
    "attention": [],
    "dropout": 0.0,
    "augment": 0,
    "patch": 4,
}


@dataclass(frozen=True)
class Reader:
    "A kind of file."

    name: str
    write: Callable[[Path], Path]  # a sound file in an empty folder: the one to damage
    read: Callable[[Path], Any]  # what is to read it or raise InputError
    share: float = 1.0  # of the files that are damaged: less where reading is slow


# -------------------------------------------------------------------------------- runs
def a_run(folder: Path) -> Path:
    config = make_config(
        {"steps": 2, "batch": 8, "network": TINY, "objective": "flow_matching"}
    )
    train_to_end(config, law_of("two_gaussians"), out=folder)
    return folder / "checkpoint.safetensors"


def weights_of_a_run(folder: Path) -> Path:
    a_run(folder).unlink()
    return folder / "model.safetensors"


def log_of_a_run(folder: Path) -> Path:
    a_run(folder)
    return folder / "log.csv"


SOUND: dict[Path, dict[str, torch.Tensor]] = {}  # weights by folder, at the first sight


def same_weights(read: Callable) -> Callable[[Path], None]:
    "A reader of a run that must be refused or give the weights that were written."

    def check(path: Path):
        ema = read(path.parent).ema
        sound = SOUND.setdefault(path.parent, ema)
        assert all(ema[name].equal(sound[name]) for name in sound), "other weights"

    return check


def read_with_any_log(path: Path):
    "The log is never in the way."
    try:
        load_run(path.parent)
    except InputError as error:
        raise AssertionError("a log was in the way") from error


# --------------------------------------------------------------------- texts and tables
def a_config(folder: Path) -> Path:
    return Path(shutil.copy(shipped_configs()["digits"], folder / "a.yaml"))


PUBLISHED = """
noising_type: Linear
coefficient_type: Euler
model_type: DiT-B-4
dataset_path: latents.hdf5
velocity_loss_ratio: 0.75
p: 1.0
eps: 0.01
time_mean: [-0.2, -1.0, 0.2]
time_std: [1.0, 0.8, 0.8]
cfg_scale: 3.0
mix_ratio: 0.25
cfg_drop_rate: 0.1
cfg_decay_time: 0.8
l_schedule: Exponent
l_init_ratio: 0.1
l_end_ratio: 0.002
total_steps: 400000
ema_decay_rate: 0.9999
learning_rate: '1e-4'
betas: [0.9, 0.99]
weight_decay: 0
batch_size: 256
seed: 1
"""


def a_published_config(folder: Path) -> Path:
    (folder / "a.yaml").write_text(PUBLISHED)
    return folder / "a.yaml"


def read_config(path: Path):
    load_config(str(path))


def a_bench(folder: Path) -> Path:
    row = dict.fromkeys(objectives.KEY, 3) | {"error": 0.1}
    (folder / "bench.json").write_text(json.dumps([row]))
    return folder / "bench.json"


def names_of_classes(folder: Path) -> Path:
    (folder / "classes.csv").write_text("wnid,name\nn01,tench\nn02,English springer\n")
    return folder / "classes.csv"


def read_names(path: Path):
    imagenet.class_words(path.parent, ["n01", "n02"])


# ------------------------------------------------------------------------------ weights
def exported(folder: Path) -> Path:
    config = make_config({"steps": 2, "network": UNET, "objective": "flow_matching"})
    run = begin(*assemble(config), config)
    save_run(folder / "run", run)
    return export_weights(folder / "run", folder / "a.safetensors")


def card_of_weights(folder: Path) -> Path:
    return exported(folder).with_suffix(".json")


def read_weights(path: Path):
    load_weights(path.with_suffix(".safetensors"))


def a_checkpoint(zipped: bool) -> Callable[[Path], Path]:
    "A published checkpoint, in the present or in the earlier form of torch's files."

    def write(folder: Path) -> Path:
        content: dict[str, Any] = dict.fromkeys(published.PARTS, 3)
        content["ema_model"] = {"a": torch.randn(5, 3)}
        content["model"] = {"a": torch.zeros(2)}
        path = folder / "a.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


def parity_numbers(folder: Path) -> Path:
    source = PARITY / "unet_linear_euler.safetensors"
    return Path(shutil.copy(source, folder / source.name))


def read_parity_numbers(path: Path):
    model_of(read_numbers(path))


def parity_table(folder: Path) -> Path:
    return Path(shutil.copy(PARITY / "schedules.json", folder / "schedules.json"))


def a_film(folder: Path) -> Path:
    source = widgets.film_folder() / "eight_gaussians.safetensors"
    for path in (source, source.with_name("SHA256SUMS")):
        shutil.copy(path, folder)
    return folder / source.name


def read_film(path: Path):
    widgets.load_film(path.stem, path.parent)


# ----------------------------------------------------------------------------- pictures
PICTURES = ("jpg", "png", "webp", "gif", "bmp", "tif", "jp2", "ppm", "tga")


def patchwork(width: int = 12, height: int = 8) -> Image.Image:
    "Eight patches of different colours: no turn or mirror image looks like it."
    numbers = np.random.default_rng(3).integers(0, 8, (height // 4, width // 4, 3))
    pixels = np.kron(36 * numbers, np.ones((4, 4, 1)))
    return Image.fromarray(pixels.astype(np.uint8))


def a_picture(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        patchwork(24, 16).save(folder / f"a.{kind}")
        return folder / f"a.{kind}"

    return write


def read_picture(path: Path):
    latents.read_picture(path, 8)


def an_entry(folder: Path) -> Path:
    "A picture as the table of CIFAR-10 holds it."
    (folder / "a.png").write_bytes(rendered_table(1, seed=5)["img"][0]["bytes"])
    return folder / "a.png"


def read_entry(path: Path):
    img = {"bytes": path.read_bytes(), "path": path.name}
    read_table({"img": [img], "label": [3]})


def a_parquet(folder: Path) -> Path:
    import datasets

    rows = datasets.Dataset.from_dict(rendered_table(4, seed=5))
    for part in ("test", "train"):
        rows.to_parquet(folder / f"{part}-0.parquet")
    return folder / "train-0.parquet"


def read_parquet(path: Path):
    parquet_tables(path.parent)


# --------------------------------------------------------------------- numbers in files
def an_npz(write: Callable) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
        write(folder / "a.npz", arr_0=pixels, other=np.arange(9.0))
        return folder / "a.npz"

    return make


def foreign(path: Path, means: np.ndarray, attributes=(), **options) -> str:
    "A latent file as other programs write it."
    with h5py.File(path, "w") as file:
        file.create_dataset("latents", data=means, **options)
        file["labels"] = np.arange(len(means))
        file["amount"] = len(means)
        file["latent_size"] = means.shape[2]
        file.attrs.update(attributes)
    return str(path)


def latent_file(**options) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        means = np.ones((3, 8, 2, 2), "f4")
        return Path(foreign(folder / "a.hdf5", means, **options))

    return write


def read_latents(path: Path):
    data = latents.Latents(str(path))
    for k in range(len(data)):
        data[k]


# ---------------------------------------------------------------------- unfinished work
def encoding_plan(folder: Path) -> Path:
    settings: dict[str, Any] = {"root": "pictures", "classes": ["a"], "part": 64}
    settings |= {"autoencoder": "pixels", "size": 32, "flip": False}
    plan = latents.Plan(files=["a/1.png", "a/2.png"], labels=[0, 0], **settings)
    (folder / latents.PLAN).write_text(json.dumps(asdict(plan)))
    return folder / latents.PLAN


def read_encoding_plan(path: Path):
    plan = latents.read_plan(path.parent)
    assert plan is not None
    latents.check_plan(plan, plan, path.parent)
    for k in range(min(plan.parts, 9)):
        list(map(plan.file_of, plan.rows_of(k)))


SAMPLING = {"weights": "0", "count": 3, "steps": 1, "seed": 0, "batch": 3}


def sampling_plan(folder: Path) -> Path:
    work = folder / "a.parts"
    work.mkdir()
    (work / latents.PLAN).write_text(json.dumps(SAMPLING))
    return work / latents.PLAN


def read_sampling_plan(path: Path):
    imagenet.begin_sampling(SAMPLING, path.parent, path.parents[1] / "a.npz")


def part_of_samples(folder: Path) -> Path:
    np.save(folder / "part-0000000.npy", np.zeros((3, 8, 8, 3), np.uint8))
    return folder / "part-0000000.npy"


def read_part(path: Path):
    imagenet.join_parts(path.with_name("joined.npz"), {path: 3})


# -------------------------------------------------------------------------------- marks
def a_submission(folder: Path) -> Path:
    assignment = hostile.write_solved(folder)
    cells = hostile.answered(assignment, hostile.RIGHT, "eve")
    (folder / "eve.ipynb").write_bytes(hostile.as_bytes(cells))
    return folder / "eve.ipynb"


def read_submission(path: Path):
    """A submission is staged or set aside with its reason, whatever it holds."""
    assignment = grading.read_assignment(path.with_name("small.ipynb"))
    staged = grading.staged_file(assignment, path, "eve")
    if staged.fault or staged.failure:
        raise InputError(staged.fault or staged.failure)


def written_marks(folder: Path) -> Path:
    path = folder / "written.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(grading.WRITTEN)
        writer.writerow(["zoë", "1", "2.5", "by the chain rule, …", "good"])
    return path


def read_written_marks(path: Path):
    list(grading.read_rows(path, ["zoë"]))


CIFAR10 = Reader("parquet", a_parquet, read_parquet, 0.1)
READERS = (
    Reader("checkpoint", a_run, same_weights(resume_run), 0.5),
    Reader("weights of a run", weights_of_a_run, same_weights(load_run), 0.5),
    Reader("log of a run", log_of_a_run, read_with_any_log, 0.5),
    Reader("configuration", a_config, read_config, 0.5),
    Reader("published configuration", a_published_config, read_config, 0.5),
    Reader("rows of a bench", a_bench, objectives.read_rows),
    Reader("names of classes", names_of_classes, read_names),
    Reader("exported weights", exported, read_weights),
    Reader("card of weights", card_of_weights, read_weights, 0.5),
    Reader("published checkpoint", a_checkpoint(True), read_checkpoint),
    Reader("earlier checkpoint", a_checkpoint(False), read_checkpoint),
    Reader("parity numbers", parity_numbers, read_parity_numbers, 0.2),
    Reader("parity", parity_numbers, published.parity, 0.05),
    Reader("parity table", parity_table, published.read_json),
    Reader("film", a_film, read_film),
    *(Reader(f"picture .{kind}", a_picture(kind), read_picture) for kind in PICTURES),
    Reader("picture in a table", an_entry, read_entry),
    *([CIFAR10] if find_spec("datasets") else []),  # an extra
    Reader("samples", an_npz(np.savez), read_npz),
    Reader("npz", an_npz(np.savez), read_arrays),
    Reader("packed npz", an_npz(np.savez_compressed), read_arrays),
    Reader("latents", latent_file(), read_latents),
    Reader("packed latents", latent_file(compression="gzip"), read_latents),
    Reader("plan of an encoding", encoding_plan, read_encoding_plan),
    Reader("plan of samples", sampling_plan, read_sampling_plan),
    Reader("part of samples", part_of_samples, read_part),
    Reader("submission", a_submission, read_submission),
    Reader("written marks", written_marks, read_written_marks),
)
