"Published settings, checkpoints and numbers: read as they are, or refused in words."

import copy
import json
import math
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from faults import in_child
from helpers import PARITY, complaint, program, soflow
from readers import PUBLISHED as B4
from soflow_edu import published
from soflow_edu.config import load_config, make_config, read_yaml, to_yaml
from soflow_edu.consistency import towards
from soflow_edu.core import InputError, build, find
from soflow_edu.published import (
    Numbers,
    compared,
    import_published,
    model_of,
    ours,
    own_name,
    parity,
    parity_table,
    passed,
    read_checkpoint,
    read_numbers,
    read_published,
    restated,
    write_numbers,
)
from soflow_edu.sampling import sample
from soflow_edu.soflow import Rows, difference_quotient, output_ahead
from soflow_edu.training import load_run, resume_run, trained

TINY = {
    "name": "unet",
    "size": 8,
    "width": 16,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention": [4],
    "dropout": 0.0,
    "augment": 6,
}

CIFAR10 = """
noising_type: Linear
coefficient_type: Euler
model_type: UNet
dataset_type: CIFAR10
velocity_loss_ratio: 0.0
p: 0.75
eps: 1e-3
time_mean: [-0.9, -4.0, -0.9]
time_std: [1.6, 1.6, 1.6]
cfg_scale: 1.0
mix_ratio: 1.0
cfg_drop_rate: 0.0
cfg_decay_time: 1.0
l_schedule: Exponent
l_init_ratio: 1.0
l_end_ratio: 3.125e-4
total_steps: 800000
ema_decay_rate: 0.9999
learning_rate: 1e-4
betas: [0.9, 0.999]
weight_decay: 0.0
batch_size: 1024
num_workers: 8
prefetch_factor: 2
working_dir: runs/cifar
eval_steps: 10000
eval_batch_size: 500
eval_NFE: 1
eval_demo_steps: 1000
eval_demo_shape: [8, 8]
ckpt_saving_steps: 10000
logging_steps: 100
seed: 42
"""


def read(text, **changes):
    'The Config of published settings after changes; "absent" takes a key out.'
    content = read_yaml(text) | changes
    kept = {key: value for key, value in content.items() if value != "absent"}
    return read_published(kept)


# ------------------------------------------------------------------------ settings
CIFAR10_OBJECTIVE = {
    "name": "soflow",
    "lam": 0.0,
    "p": 0.75,
    "eps": 0.001,
    "times": {
        "name": "logit_normal",
        "velocity": [-0.9, 1.6],
        "t": [-0.9, 1.6],
        "s": [-4.0, 1.6],
    },
    "schedule": {"name": "exponential", "r_init": 1.0, "r_end": 1 / 3200},
    "target": "conditional",
}
CIFAR10_CONFIG = {
    "data": {"name": "cifar10", "augment": 0.12},
    "device": "auto",
    "path": "linear",
    "coefficients": "euler",
    "network": {"name": "unet"},
    "objective": CIFAR10_OBJECTIVE,
    "steps": 800_000,
    "batch": 1024,
    "learning_rate": 1e-4,
    "warmup": 0,
    "decay": "constant",
    "betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "ema": 0.9999,
    "seed": 42,
    "checkpoint_every": 10_000,
    "optimiser": "radam",
    "log_every": 100,
}

B4_JUMPS = {"r_init": 0.1, "r_end": 0.002}
B4_TARGET = {"name": "guided", "w": 3.0, "m": 0.25, "decay": 0.8, "drop": 0.1}
B4_OBJECTIVE = {
    "name": "soflow",
    "lam": 0.75,
    "p": 1.0,
    "eps": 0.01,
    "times": {
        "name": "logit_normal",
        "velocity": [-0.2, 1.0],
        "t": [0.2, 0.8],
        "s": [-1.0, 0.8],
    },
    "schedule": {"name": "exponential"} | B4_JUMPS,
    "target": B4_TARGET,
}
B4_CONFIG = {
    "device": "auto",
    "data": {"name": "latents", "path": "latents.hdf5"},
    "network": {"name": "dit", "model": "B/4"},
    "objective": B4_OBJECTIVE,
    "steps": 400_000,
    "batch": 256,
    "learning_rate": 1e-4,
    "warmup": 0,
    "decay": "constant",
    "ema": 0.9999,
    "seed": 1,
    "optimiser": "adamw",
}


def test_published_settings():
    "Every field of both settings, also those that stay at a default of the library."
    unet = read(CIFAR10)
    assert unet == make_config(CIFAR10_CONFIG)
    assert unet.seconds is None
    dit = read(B4)
    assert dit == make_config(B4_CONFIG)
    assert make_config(read_yaml(to_yaml(dit))) == dit


def test_laws_are_those_that_the_library_names():
    for text, variant in ((CIFAR10, "cifar10"), (B4, "imagenet")):
        given = read(text).objective["times"]
        known = build("times", {"name": "published", "variant": variant})
        for name in ("velocity", "t", "s"):
            assert tuple(given[name]) == getattr(known, name)


VALUES = [
    ({"noising_type": "Trig"}, "path", "trigonometric"),
    ({"noising_type": "Triangular"}, "path", "trigonometric"),
    ({"coefficient_type": "Trig"}, "coefficients", "trigonometric"),
    ({"model_type": "DiT-XL-2"}, "network", {"name": "dit", "model": "XL/2"}),
    ({"total_steps": "4e5"}, "steps", 400_000),
    ({"betas": "(0.9, 0.95)"}, "betas", (0.9, 0.95)),
    ({"betas": ["0.9", 0.95]}, "betas", (0.9, 0.95)),
    ({"optimizer": "RAdam"}, "optimiser", "radam"),
    ({"seed": "absent"}, "seed", 0),
    ({"ckpt_saving_steps": 500}, "checkpoint_every", 500),
    ({"weight_decay": "absent"}, "weight_decay", 0.0),
    ({"dataset_path": "absent"}, "data", {"name": "latents"}),
]


@pytest.mark.parametrize("given, field, expected", VALUES, ids=str)
def test_values_are_taken_over(given, field, expected):
    assert getattr(read(B4, **given), field) == expected


CONSTANT = {"l_schedule": "Const", "l_init_ratio": "absent"}
UNGUIDED = {"cfg_scale": "absent", "mix_ratio": "absent"}
FINER_JUMPS = {"name": "exponential", "r_init": 0.1, "r_end": 1 / 3200}
PARTS_OF_OBJECTIVES = [
    (CONSTANT, "schedule", {"name": "constant", "r_end": 0.002}),
    ({"l_schedule": "Linear"}, "schedule", {"name": "linear"} | B4_JUMPS),
    ({"l_schedule": "Cosine"}, "schedule", {"name": "cosine"} | B4_JUMPS),
    ({"l_end_ratio": "1/3200"}, "schedule", FINER_JUMPS),
    ({"cfg_scale": 1}, "target", "conditional"),
    (UNGUIDED, "target", "conditional"),
    ({"mix_ratio": 0}, "target", B4_TARGET | {"m": 0.0}),
]


@pytest.mark.parametrize("given, part, expected", PARTS_OF_OBJECTIVES, ids=str)
def test_objectives_are_taken_over(given, part, expected):
    assert read(B4, **given).objective[part] == expected


HALF_GUIDED = {"cfg_drop_rate": "absent", "mix_ratio": None}
NUMBERS = {
    "1/3200": 1 / 3200,
    " 4e5 ": 4e5,
    "1e-" + "9" * 30: 0.0,
    "1e" + "9" * 30: math.inf,
    10**400: math.nan,
    "1/0": math.nan,
    "1/2/3": math.nan,
    "a lot": math.nan,
    True: math.nan,
}


@pytest.mark.parametrize("given", NUMBERS, ids=lambda given: str(given)[:12])
def test_a_number_is_read_at_once_however_it_is_written(given):
    ended = in_child(partial(published.as_number, given), seconds=20)
    assert ended.how == "done", ended.said
    assert ended.value == pytest.approx(NUMBERS[given], nan_ok=True)


REFUSED_SETTINGS = [
    ({"noising_type": "linear"}, "'Linear'"),
    ({"noising_type": "Trigonometric"}, "noising_type"),
    ({"coefficient_type": "Eular"}, "'Euler'"),
    ({"model_type": "DiT-B/4"}, "'DiT-B-4'"),
    ({"model_type": ["UNet"]}, "model_type"),
    ({"l_schedule": "Exponential"}, "'Exponent'"),
    ({"mix_ration": 0.25}, "'mix_ratio'"),
    ({"eps": "absent"}, "lacks eps"),
    ({"l_init_ratio": "absent"}, "lacks l_init_ratio"),
    (HALF_GUIDED, "lacks mix_ratio, cfg_drop_rate"),
    ({"eps": "small"}, "eps is 'small'"),
    ({"p": -1}, "at least 0"),
    ({"p": True}, "p is True"),
    ({"total_steps": 1.5}, "whole number"),
    ({"total_steps": 0}, "at least 1"),
    ({"time_mean": [0, 1]}, "list of 3"),
    ({"time_std": [1, 1, 0]}, "deviation"),
    ({"betas": 0.9}, "list of 2"),
    ({"betas": [0.9, 1.0]}, "betas"),
    ({"l_end_ratio": 0}, "r_end"),
    ({"l_init_ratio": 2}, "r_init"),
    ({"velocity_loss_ratio": 1.5}, "lam"),
    ({"mix_ratio": 2}, "m is 2"),
    ({"cfg_drop_rate": 0}, "drop is 0"),
    ({"cfg_scale": -1}, "cfg_scale"),
    ({"learning_rate": "fast"}, "learning_rate"),
    ({"learning_rate": math.inf}, "learning_rate"),
    ({"dataset_type": "CIFAR10"}, "dataset_type"),
    ({"data_size": [3, 32, 32]}, "data_size"),
    ({"optimizer": "Adam"}, "AdamW, RAdam"),
    ({"model_type": "UNet", "cfg_scale": 3.0}, "no classes"),
    ({"ema_decay_rate": 2}, "ema"),
]


@pytest.mark.parametrize("given, words", REFUSED_SETTINGS, ids=str)
def test_settings_that_are_not_understood_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        read(B4, **given)


KEYS_OF_THE_PUBLIC_CODE = """
working_dir noising_type coefficient_type model_type
dataset_type data_size dataset_path
velocity_loss_ratio p eps time_mean time_std
cfg_scale mix_ratio cfg_drop_rate cfg_decay_time
l_schedule l_init_ratio l_end_ratio
total_steps ema_decay_rate learning_rate betas weight_decay
batch_size num_workers prefetch_factor
eval_steps eval_batch_size eval_NFE eval_demo_steps eval_demo_shape
ckpt_saving_steps logging_steps seed
"""


def test_every_key_is_known():
    "Each key is either mapped or said to have no meaning here, and only one of them."
    mapped = set(published.KEYS)
    unused = set(published.UNUSED)
    ours_alone = {"optimizer"}
    assert set(KEYS_OF_THE_PUBLIC_CODE.split()) == (mapped | unused) - ours_alone
    assert not mapped & unused


def test_load_config_reads_published_files(tmp_path):
    good = tmp_path / "cifar.yaml"
    good.write_text(CIFAR10)
    assert load_config(str(good)) == read(CIFAR10)
    bad = tmp_path / "bad.yml"
    bad.write_text(CIFAR10.replace("Exponent", "exponent"))
    with pytest.raises(InputError, match="'Exponent'"):
        load_config(str(bad))


# ------------------------------------------------------------------------ checkpoints
def filled(network=TINY):
    "A network in which every weight matters: those of norms and biases are near 1."
    net = build("network", network).eval()
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim > 1:
            scale = 1 / math.sqrt(p[0].numel())
            p.data.copy_(noise * scale)
        else:
            p.data.copy_(noise * 0.1 + 1)
    return net


def checkpoint(net, prefix="network.", **changes):
    "What the public code saves of a network: averaged weights and weights in training."
    weights = net.state_dict().items()
    averaged = {prefix + name: value.clone() for name, value in weights}
    in_training = {name: value + 1 for name, value in averaged.items()}
    optimiser = {
        "state": {0: {"step": torch.tensor(7.0)}},
        "param_groups": [{"lr": 1e-4}],
    }
    content = {
        "model": in_training,
        "ema_model": averaged,
        "optimizer": optimiser,
        "finished_steps": 700,
        "finished_epochs": 2,
    }
    return content | changes


def save_tiny(file, **changes):
    "Writes a checkpoint of the small U-Net."
    torch.save(checkpoint(filled(), **changes), file)


def import_tiny(file, out):
    "Imports a checkpoint as a run of the small U-Net."
    return import_published(file, CIFAR10, out, network=TINY)


PREFIXES = ["network.", "module.network.", "module._orig_mod.network.", ""]
FILES_OF_A_RUN = {"model.safetensors", "config.yaml", "run.json", "log.csv"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_checkpoint_becomes_a_run(tmp_path, prefix):
    "The run has the averaged weights, not those in training, and cannot be resumed."
    save_tiny(tmp_path / "700.pt", prefix=prefix)
    folder = import_tiny(tmp_path / "700.pt", tmp_path / "run")
    assert {file.name for file in folder.iterdir()} == FILES_OF_A_RUN
    run = load_run(folder)
    x1 = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    one = torch.ones(3)
    with torch.no_grad():
        by_averaged_weights = x1 - filled()(x1, one, one)
        assert torch.equal(sample(trained(run), x1), by_averaged_weights)
    assert run.step == 700
    assert run.steps == 800_000
    assert run.config.optimiser == "radam"
    assert run.objective["eps"] == 0.001
    assert run.log == []
    assert asdict(run.config) == asdict(replace(read(CIFAR10), network=TINY))
    with pytest.raises(InputError, match="not trained further"):
        resume_run(folder)


def test_an_earlier_run_is_kept_and_other_folders_are_not_touched(tmp_path):
    file = tmp_path / "700.pt"
    save_tiny(file)
    for _ in range(2):
        import_tiny(file, tmp_path / "run")
    assert load_run(tmp_path / "run-1").step == 700
    assert load_run(tmp_path / "run").step == 700
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        import_tiny(file, mine)


def test_a_run_in_double_or_half_precision_is_written_as_the_network_wants_it(tmp_path):
    file = tmp_path / "5.pt"
    step = torch.tensor(5)
    torch.save(checkpoint(filled().double(), finished_steps=step), file)
    run = load_run(import_tiny(file, tmp_path / "run"))
    assert run.step == 5
    assert {value.dtype for value in run.ema.values()} == {torch.float32}


def test_every_misfit_is_named(tmp_path):
    content = checkpoint(filled())
    tensors = content["ema_model"]
    names = list(tensors)
    missing = names[:3]
    misshapen = names[4]
    spoilt = names[6]
    whole = names[7]
    for name in missing:
        del tensors[name]
    tensors["network.more"] = torch.zeros(1)
    tensors[misshapen] = torch.zeros(5)
    tensors[spoilt] = torch.full_like(tensors[spoilt], math.nan)
    tensors[whole] = tensors[whole].long()
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(InputError) as caught:
        import_tiny(tmp_path / "bad.pt", tmp_path / "run")
    reasons = [f"{own_name(name)} missing" for name in missing] + [
        "more unknown",
        f"{own_name(misshapen)} has shape (5,)",
        f"{own_name(spoilt)} is not finite",
        f"{own_name(whole)} holds torch.int64",
        "in 7 of",
    ]
    for reason in reasons:
        assert reason in str(caught.value)
    assert not (tmp_path / "run").exists()


def write_nothing(file):
    "Leaves the file missing."


def write_text(file):
    file.write_text("hello, this is text")


def save_weights_alone(file):
    torch.save(filled().state_dict(), file)


def save_without_average(file):
    content = checkpoint(filled())
    del content["ema_model"]
    torch.save(content, file)


A_NUMBER = {"network.a": 1.0}
NAMED_TWICE = {"network.a": torch.zeros(1), "a": torch.zeros(1)}
BAD_CHECKPOINTS = {  # what writes the file, and what is said of it
    "missing": (write_nothing, "missing"),
    "a folder": (Path.mkdir, "a folder"),
    "text": (write_text, "no torch file"),
    "empty": (Path.touch, "no torch file"),
    "numpy": (
        partial(save_tiny, finished_steps=numpy.int64(7)),
        "holds the object numpy",
    ),
    "objects": (partial(save_tiny, optimizer=Path("x")), "holds the object pathlib"),
    "a tensor": (partial(torch.save, torch.zeros(3)), "holds Tensor"),
    "weights alone": (save_weights_alone, "lacks model, ema_model"),
    "no average": (save_without_average, "lacks ema_model"),
    "no tensors": (
        partial(save_tiny, ema_model=A_NUMBER),
        "something else than tensors",
    ),
    "steps": (partial(save_tiny, finished_steps=-1), "finished_steps is -1"),
    "twice": (partial(save_tiny, ema_model=NAMED_TWICE), "same name"),
}


def bytes_by_file(folder):
    return {file: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_files_that_are_no_checkpoint_are_refused_and_an_earlier_run_stays(
    tmp_path, kind
):
    save_tiny(tmp_path / "good.pt")
    folder = import_tiny(tmp_path / "good.pt", tmp_path / "run")
    before = bytes_by_file(folder)
    write, words = BAD_CHECKPOINTS[kind]
    write(tmp_path / "bad.pt")
    with pytest.raises(InputError, match=words):
        import_tiny(tmp_path / "bad.pt", folder)
    assert bytes_by_file(folder) == before
    assert not (tmp_path / "run-1").exists()


def test_cut_checkpoints_are_refused(tmp_path):
    "Whole ones are read, also in torch's format before zip files."
    good = tmp_path / "good.pt"
    save_tiny(good)
    whole = good.read_bytes()
    cut = tmp_path / "cut.pt"
    for length in (100, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut or no torch file"):
            read_checkpoint(cut)
    old = tmp_path / "old.pt"
    content = checkpoint(filled())
    torch.save(content, old, _use_new_zipfile_serialization=False)
    assert read_checkpoint(old)["finished_steps"] == 700


def test_a_model_type_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "700.pt"
    save_tiny(file)
    with pytest.raises(InputError, match="does not fit the network unet"):
        import_published(file, CIFAR10, tmp_path / "run")
    with pytest.raises(InputError, match="does not fit the network dit"):
        import_published(file, B4, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def public_table(name):
    "What a public file of numbers in JSON holds."
    return json.loads((PARITY / name).read_text())


def test_the_published_size_is_read(tmp_path):
    "A file with the published names and shapes, each tensor one number in memory."
    shapes = public_table("checkpoint_shapes.json")["UNet"]
    tensors = {name: torch.full((), 0.5).expand(shapes[name]) for name in shapes}
    file = tmp_path / "800000.pt"
    save_tiny(file, ema_model=tensors)
    network = read(CIFAR10).network
    given = published.averaged(read_checkpoint(file), network, "file")
    assert len(given) == 425
    assert sum(value.numel() for value in given.values()) > 55.9e6
    tensors["network.map_layer0.bias"] = torch.zeros(4)
    content = checkpoint(filled(), ema_model=tensors)
    words = r"map_layer0.bias has shape \(4,\) instead of \(512,\)"
    with pytest.raises(InputError, match=words):
        published.averaged(content, "unet", "file")


# ------------------------------------------------------------------------ parity
SETTINGS_OF_NUMBERS = {
    "network": "UNet",
    "noising": "Linear",
    "coefficients": "Euler",
    "guidance_scale": 1.0,
    "mix_ratio": 1.0,
    "decay_time": 1.0,
    "p": 0.75,
    "eps": 0.001,
}
FEW_GRADIENTS = ("conv.weight", "layer0.weight", "block0.conv0.weight")


def batch_for(net, r, B=6):
    "Noise as data for a U-Net, with times whose steps are r of their way."
    g = torch.Generator().manual_seed(1)
    o = net.options
    t = 0.3 + 0.6 * torch.rand(B, generator=g)
    s = t * (0.2 + 0.5 * torch.rand(B, generator=g))
    x0, x1 = torch.randn(2, B, o["channels"], o["size"], o["size"], generator=g)
    batch = {"x0": x0, "x1": x1, "t": t, "s": s, "l": towards(t, s, r)}
    batch["cfg_mask"] = torch.arange(B) < 2
    if o["augment"]:
        batch["augment_labels"] = torch.randn(B, o["augment"], generator=g)
    return batch


def in_a_file(result):
    "Whether a file of numbers holds a result: all but most of the gradients."
    return "/grad/" not in result or result.endswith(FEW_GRADIENTS)


def numbers_of(net, r=0.2, **settings):
    "A batch for a network, and what the plain formulas give for it in float64."
    meta = SETTINGS_OF_NUMBERS | {"r": r} | settings
    numbers = Numbers("made", meta, net.state_dict(), batch_for(net, r), {})
    values = restated(numbers, copy.deepcopy(net).double())
    kept = {name: values[name].float() for name in values if in_a_file(name)}
    return replace(numbers, results=kept)


def changed(numbers, **tables):
    "Numbers after entries of their tables were added or replaced."
    whole = {name: getattr(numbers, name) | tables[name] for name in tables}
    return replace(numbers, **whole)


def by_plain_formulas(numbers, net):
    "Numbers with the results that the plain formulas give in the net's precision."
    values = restated(numbers, net)
    return replace(numbers, results={name: values[name] for name in numbers.results})


def above(rows):
    "What is above its limit."
    return [row.what for row in rows if not row.ok]


def groups_above(rows):
    return {row.group for row in rows if not row.ok}


def limits_of(rows, group):
    return {row.limit for row in rows if row.group == group}


@pytest.fixture(scope="module")
def made():
    "Numbers of the small U-Net."
    return numbers_of(filled())


@pytest.fixture(scope="module")
def made_file(made, tmp_path_factory):
    "The same numbers in a file."
    folder = tmp_path_factory.mktemp("numbers")
    return write_numbers(folder / "made.safetensors", made)


DIT_NUMBERS = [
    "linear_euler_decay",
    "linear_euler_guided",
    "linear_euler_plain",
    "trig_trig_guided",
]


def test_the_public_numbers():
    "All of the U-Net; schedules; names and shapes; and which files are of the DiT."
    rows = parity(PARITY)
    assert passed(rows)
    assert passed(parity(PARITY, only="unet"))
    unet = [row.ok for row in rows if row.network == "unet"]
    schedules = [row.ok for row in rows if row.network == "any"]
    assert unet == [True] * 17
    assert schedules == [True] * 7
    dit = [row.file for row in parity(PARITY, only="dit") if row.network == "dit"]
    of_numbers = [f"dit_{name}" for name in DIT_NUMBERS]
    assert set(dit) == {"checkpoint_shapes", *of_numbers}


def test_the_plain_formulas_give_the_public_numbers():
    "So they may serve as an oracle where there is no public file."
    numbers = read_numbers(PARITY / "unet_linear_euler.safetensors")
    values = restated(numbers, model_of(numbers).net)
    assert above(compared(numbers, values)) == []


SETTINGS = [  # noising, coefficients, p, eps
    ("Trig", "Trig", 1.0, 0.01),
    ("Linear", "Trig", 0.5, 0.01),
    ("Trig", "Euler", 0.25, 1e-4),
    ("Linear", "Euler", 2.0, 0.1),
    ("Triangular", "Triangular", 0.0, 0.01),
]


@pytest.mark.parametrize("noising, coefficients, p, eps", SETTINGS, ids=str)
def test_every_pair_of_path_and_coefficients(tmp_path, noising, coefficients, p, eps):
    settings = {"noising": noising, "coefficients": coefficients, "p": p, "eps": eps}
    numbers = numbers_of(filled(), **settings)
    rows = parity(write_numbers(tmp_path / "made.safetensors", numbers))
    assert passed(rows), parity_table(rows)
    assert len(rows) == len(numbers.results)
    assert len(rows) >= 20


OTHER_NETWORKS = [
    {"blocks": 2, "multipliers": [2, 1, 2], "attention": [8, 2]},
    {"size": 16, "width": 24, "multipliers": [1], "attention": []},
    {"channels": 1, "augment": 0},
    {"classes": 3},
]


@pytest.mark.parametrize("network", OTHER_NETWORKS, ids=str)
def test_networks_of_any_size_are_read_off_their_tensors(tmp_path, network):
    network = TINY | network
    numbers = numbers_of(filled(network))
    options = published.unet_options(numbers.weights)
    assert build("network", options).spec() == build("network", network).spec()
    assert passed(parity(write_numbers(tmp_path / "made.safetensors", numbers)))


def with_gap(numbers, gap):
    "Numbers of which one t - l is short, and that gap in float32."
    l = numbers.given["l"].clone()
    l[0] = numbers.given["t"][0] - gap
    numbers = changed(numbers, given={"l": l})
    return numbers, (numbers.given["t"][0] - l[0]).item()


@pytest.mark.parametrize("gap", [7e-4, 1e-4, 1e-5])
def test_small_gaps(tmp_path, gap):
    """Where some t - l is below 1e-3, the limits of scm grow with 1 / gap.

    The plain formulas give the numbers in float32, as a reference would. Both it and
    the library stay within a last place over the gap from float64."""
    numbers, gap = with_gap(numbers_of(filled(), r=0.02), gap)
    numbers = by_plain_formulas(numbers, model_of(numbers).net)
    rows = parity(write_numbers(tmp_path / "made.safetensors", numbers))
    assert passed(rows)
    grown = 2**-23 / gap
    assert limits_of(rows, "scm gradients") == {max(2e-4, 0.7 * grown)}
    assert limits_of(rows, "scm losses") == {max(2e-6, 0.2 * grown)}
    assert limits_of(rows, "fm gradients") == {5e-6}
    off = [row for row in rows if row.group == "scm gradients"]
    assert all(row.ours_off < grown for row in off)
    assert all(row.theirs_off < grown for row in off)
    assert max(row.ours_off for row in off) > grown / 20


def test_a_reference_that_rounds_in_another_way_is_none_that_is_wrong(tmp_path):
    "At a short t - l the numbers in float64 pass, and those of a mistake do not."
    numbers, gap = with_gap(numbers_of(filled(), r=0.02), 1e-4)
    exact = restated(numbers, copy.deepcopy(model_of(numbers).net).double())
    kept = {name: exact[name].float() for name in numbers.results}
    rows = parity(
        write_numbers(tmp_path / "a.safetensors", replace(numbers, results=kept))
    )
    assert passed(rows), parity_table(rows)
    grad = "scm/grad_norm"
    (row,) = [row for row in rows if row.what == grad]
    assert row.theirs_off < 1e-6 < row.ours_off
    wrong = kept | {grad: kept[grad] * 1.005}
    rows = parity(
        write_numbers(tmp_path / "b.safetensors", replace(numbers, results=wrong))
    )
    assert above(rows) == [grad]
    table = parity_table(rows)
    assert f"{row.ours_off:.1e}" in table
    assert max(map(len, table.splitlines())) <= 100


def test_the_quotient_of_the_training_is_the_published_one_without_its_rounding():
    numbers = numbers_of(filled(), coefficients="Trig")
    model = model_of(numbers).double()
    d = {name: value.double() for name, value in numbers.given.items()}
    t = d["t"]
    s = d["s"]
    l = d["l"]
    extras = {"augment": d["augment_labels"]}
    xt, v = model.path.interpolate(d["x0"], d["x1"], t)
    rows = Rows(xt, v, t, s, l, extras=extras)
    Fl = output_ahead(model, rows, v)
    F = model.F(xt, t, s, **extras)
    theirs = published.published_quotient(model, rows, v, F, Fl)
    own = difference_quotient(model, xt, t, s, l, v, F, Fl)
    torch.testing.assert_close(theirs, own, rtol=1e-9, atol=1e-9)


def change_nothing(net):
    "For mistakes that are in the settings."


def change_norms(net):
    for part in net.modules():
        if isinstance(part, nn.GroupNorm):
            part.eps = 1e-5


def change_a_weight(net):
    net.map_layer0.weight.data[0, 0] += 1e-2


def exchange_times(net):
    "The waves of t - s come to the weights for those of t, and the other way round."
    weight = net.map_layer0.weight.data
    weight.copy_(weight.roll(net.width * 2, 1))


MISTAKES = {  # in the network and in the settings
    "the constant of the norms": (change_norms, {}),
    "eps of the loss": (change_nothing, {"eps": 0.0011}),
    "p": (change_nothing, {"p": 0.76}),
    "the path": (change_nothing, {"noising": "Trig"}),
    "the coefficients": (change_nothing, {"coefficients": "Trig"}),
    "a weight": (change_a_weight, {}),
    "t - s and t exchanged": (exchange_times, {}),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_found(made_file, kind):
    numbers = read_numbers(made_file)
    assert passed(compared(numbers, ours(numbers, model_of(numbers))))
    change, settings = MISTAKES[kind]
    mistaken = changed(numbers, meta=settings)
    model = model_of(mistaken)
    change(model.net)
    rows = compared(numbers, ours(mistaken, model))
    assert not passed(rows)
    table = parity_table(rows)
    assert "ABOVE" in table
    assert "is off by" in table


def test_a_number_that_is_none_fails(made_file):
    "NaN is above every limit; where the reference is 0, so is all that is not 0."
    numbers = read_numbers(made_file)
    spoilt = changed(numbers, results={"fm/mse": torch.tensor(math.nan)})
    assert not passed(compared(spoilt, ours(spoilt, model_of(spoilt))))
    zero = replace(numbers, results={"scm/mse": torch.tensor(0.0)})
    (small,) = compared(zero, {"scm/mse": torch.tensor(1e-9)})
    assert small.error == math.inf
    (same,) = compared(zero, {"scm/mse": torch.tensor(0.0)})
    assert same.ok


# ------------------------------------------------------------------------ guidance
OTHER_GUIDANCE = ({"guidance_scale": 2.9}, {"mix_ratio": 0.3}, {"decay_time": 0.3})


def compared_after(numbers, **tables):
    "Numbers beside what the library computes after a change of them."
    values = ours(changed(numbers, **tables), model_of(numbers))
    return compared(numbers, values)


def check_that_guidance_matters(numbers):
    "w, m and the decay change both losses; the mask does, and no output."
    for other in OTHER_GUIDANCE:
        off = groups_above(compared_after(numbers, meta=other))
        assert {"fm gradients", "scm gradients"} <= off, other
    mask = ~numbers.given["cfg_mask"]
    rows = compared_after(numbers, given={"cfg_mask": mask})
    assert not passed(rows)
    assert "outputs" not in groups_above(rows)


@pytest.mark.parametrize("name", DIT_NUMBERS)
def test_public_numbers_with_guidance(name):
    file = PARITY / f"dit_{name}.safetensors"
    rows = parity(file, only="dit")
    assert passed(rows), parity_table(rows)
    assert above(rows) == []
    assert len(rows) == 18
    numbers = read_numbers(file)
    values = restated(numbers, model_of(numbers).net)
    assert above(compared(numbers, values)) == []
    if numbers.guided:
        check_that_guidance_matters(numbers)


def test_m_of_zero_keeps_the_data_in_the_regression():
    "m = 0 for x_l only: the flow-matching loss keeps m = 1."
    numbers = read_numbers(PARITY / "dit_linear_euler_guided.safetensors")
    model = model_of(numbers)
    with_zero = changed(numbers, meta={"mix_ratio": 0.0})
    zero = ours(with_zero, model)
    assert above(compared(by_plain_formulas(with_zero, model.net), zero)) == []
    one = ours(changed(numbers, meta={"mix_ratio": 1.0}), model)
    assert torch.equal(zero["fm/surrogate"], one["fm/surrogate"])
    assert not torch.equal(zero["scm/surrogate"], one["scm/surrogate"])


# ------------------------------------------------------------------------ bad input
MISSING_TENSORS = [
    ("x1", "lacks x1"),
    ("fm/mse", "lacks fm/mse"),
    ("f(x1,1,0)", r"lacks f\(x1,1,0\)"),
    ("augment_labels", "lacks augment_labels"),
]


def without(table, what):
    "A table without an entry, if it has that."
    return {name: value for name, value in table.items() if name != what}


@pytest.mark.parametrize("what, words", MISSING_TENSORS)
def test_a_missing_tensor_is_named(tmp_path, made, what, words):
    given = without(made.given, what)
    results = without(made.results, what)
    fewer = replace(made, given=given, results=results)
    with pytest.raises(InputError, match=words):
        parity(write_numbers(tmp_path / "less.safetensors", fewer))


ONE = torch.zeros(1)


def with_two_times(numbers):
    return changed(numbers, given={"t": numbers.given["t"][:2]})


def without_a_layer(numbers):
    weights = numbers.weights.items()
    kept = {name: value for name, value in weights if "map_layer0" not in name}
    return replace(numbers, weights=kept)


UNFIT_NUMBERS = {  # by what is said of them
    "fm/more, which": partial(changed, results={"fm/more": ONE}),
    "extra, which": partial(changed, given={"extra": ONE}),
    r"t has shape \(2,\)": with_two_times,
    r"F\(x1,t,s\) has shape": partial(changed, results={"F(x1,t,s)": ONE}),
    "no such parameter": partial(changed, results={"fm/grad/nothing": ONE}),
    "map_layer0.weight missing": without_a_layer,
    "no U-Net": partial(replace, weights={"a": ONE}),
    "lacks weights": partial(replace, weights={}),
    "'Linear'": partial(changed, meta={"noising": "linear"}),
    "p is 'half'": partial(changed, meta={"p": "half"}),
    "lack noising": partial(replace, meta={"network": "UNet"}),
    "network": partial(changed, meta={"network": "MLP"}),
    "no labels to guide by": partial(changed, meta={"guidance_scale": 2.0}),
}


@pytest.mark.parametrize("words", UNFIT_NUMBERS)
def test_numbers_that_cannot_be_compared_are_refused(tmp_path, made, words):
    unfit = UNFIT_NUMBERS[words](made)
    with pytest.raises(InputError, match=words):
        parity(write_numbers(tmp_path / "bad.safetensors", unfit))


OTHER_FILES = [  # name, content, words
    ("a.json", "{", "cut or no JSON"),
    ("a.json", "[1, 2]", "no table"),
    ("a.json", "{}", "no table"),
    ("a.json", '{"UNet": 3}', "no table of shapes"),
    ("a.json", '{"Unet": {"a": [1]}}', "'UNet'"),
    ("a.json", '{"r/Expo": [1]}', "r/Expo"),
    ("a.json", '{"r/Linear": [1]}', "list of 11"),
    ("a.json", '{"t": [0, 1], "other/1": [0, 1]}', "other/1"),
    ("a.json", '{"t": [0, 1], "guidance_decay/x": [0, 1]}', "guidance_decay/x"),
    ("a.json", '{"t": [0, "x"]}', "t is 'x'"),
    ("a.safetensors", "no tensors", "no safetensors"),
    ("a.txt", "no tensors", "no safetensors"),
]


@pytest.mark.parametrize("name, content, words", OTHER_FILES)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        parity(tmp_path / name)


def test_missing_empty_and_cut(tmp_path, made_file):
    lost = tmp_path / "lost"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.md").write_text("nothing here")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(made_file.read_bytes()[:-1000])
    cases = [
        (lost, "is missing"),
        (tmp_path / "lost.json", "is missing"),
        (empty, "holds no file of numbers"),
        (cut, "cut or no safetensors"),
        ([], "nothing to compare"),
        ([made_file, lost], "is missing"),
    ]
    for paths, words in cases:
        with pytest.raises(InputError, match=words):
            parity(paths)
    with pytest.raises(InputError, match="'unet'"):
        parity(made_file, only="unett")
    with pytest.raises(InputError, match="nothing to compare of the network dit"):
        parity(made_file, only="dit")


def test_schedules_and_shapes_that_differ_are_found(tmp_path):
    "A tensor of another shape counts twice: theirs is not ours, nor ours theirs."
    schedules = public_table("schedules.json")
    schedules["r/Cosine"][3] += 1e-6
    schedules["guidance_decay/0.8"][-2] += 1e-6
    (tmp_path / "schedules.json").write_text(json.dumps(schedules))
    assert set(above(parity(tmp_path))) == {"r/Cosine", "guidance_decay/0.8"}
    shapes = public_table("checkpoint_shapes.json")["UNet"]
    shapes["network.map_layer0.bias"] = [511]
    (tmp_path / "shapes.json").write_text(json.dumps({"UNet": shapes}))
    rows = parity(tmp_path / "shapes.json")
    assert [row.ok for row in rows] == [False]
    assert not passed(rows)
    assert rows[0].error == 2


def test_the_reader_is_found_by_name():
    assert find("reader", "published") is read_published


@pytest.mark.slow
def test_parity_passes_in_a_fresh_process():
    "Networks are imported when asked for: nothing depends on what was imported before."
    done = program("soflow", "parity", PARITY, "--only", "unet")
    assert done.status == 0, done.said
    assert "ABOVE" not in done.out
    assert ", 0 above." in done.out
    assert soflow("parity", "nowhere").status == 2


# --------------------------------------------------------------------- damaged files
def test_a_packed_checkpoint_is_not_unpacked(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(dict.fromkeys(published.PARTS, torch.zeros(10**6)), path)
    packed = tmp_path / "b.pt"
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "torch packs nothing" in complaint(read_checkpoint, packed)
