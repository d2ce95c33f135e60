"Published settings, checkpoints and numbers: read as they are, or refused in words."

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import PARITY, program, soflow
from soflow_edu import config as config_module
from soflow_edu import published
from soflow_edu.config import load_config, make_config, read_yaml, to_yaml
from soflow_edu.consistency import towards
from soflow_edu.core import InputError, build, find, names
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

PARITY = Path(__file__).parent / "parity"
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
B4 = """
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


def read(text, **changes):
    return read_published(
        {
            key: value
            for key, value in (read_yaml(text) | changes).items()
            if value != "absent"
        }
    )


# ---------------------------------------------------------------------------------------------------- settings
def test_published_settings():
    "Every field of both settings, those that stay at a default of the library included."
    times = {
        "name": "logit_normal",
        "velocity": [-0.9, 1.6],
        "t": [-0.9, 1.6],
        "s": [-4.0, 1.6],
    }
    objective = {
        "name": "soflow",
        "lam": 0.0,
        "p": 0.75,
        "eps": 0.001,
        "times": times,
        "schedule": {"name": "exponential", "r_init": 1.0, "r_end": 1 / 3200},
        "target": "conditional",
    }
    unet = read(CIFAR10)
    assert unet == make_config(
        {
            "data": {"name": "cifar10", "augment": 0.12},
            "device": "auto",
            "path": "linear",
            "coefficients": "euler",
            "network": {"name": "unet"},
            "objective": objective,
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
    )
    times = {
        "name": "logit_normal",
        "velocity": [-0.2, 1.0],
        "t": [0.2, 0.8],
        "s": [-1.0, 0.8],
    }
    objective = {
        "name": "soflow",
        "lam": 0.75,
        "p": 1.0,
        "eps": 0.01,
        "times": times,
        "schedule": {"name": "exponential", "r_init": 0.1, "r_end": 0.002},
        "target": {"name": "guided", "w": 3.0, "m": 0.25, "decay": 0.8, "drop": 0.1},
    }
    dit = read(B4)
    assert dit == make_config(
        {
            "device": "auto",
            "data": {"name": "latents", "path": "latents.hdf5"},
            "network": {"name": "dit", "model": "B/4"},
            "objective": objective,
            "steps": 400_000,
            "batch": 256,
            "learning_rate": 1e-4,
            "warmup": 0,
            "decay": "constant",
            "ema": 0.9999,
            "seed": 1,
            "optimiser": "adamw",
        }
    )
    assert unet.seconds is None and make_config(read_yaml(to_yaml(dit))) == dit


def test_laws_are_those_that_the_library_names():
    for text, variant in ((CIFAR10, "cifar10"), (B4, "imagenet")):
        given, known = (
            read(text).objective["times"],
            build("times", {"name": "published", "variant": variant}),
        )
        assert all(
            tuple(given[name]) == getattr(known, name)
            for name in ("velocity", "t", "s")
        )


@pytest.mark.parametrize(
    "given, field, expected",
    [
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
    ],
    ids=str,
)
def test_values_are_taken_over(given, field, expected):
    assert getattr(read(B4, **given), field) == expected


@pytest.mark.parametrize(
    "given, part, expected",
    [
        (
            {"l_schedule": "Const", "l_init_ratio": "absent"},
            "schedule",
            {"name": "constant", "r_end": 0.002},
        ),
        (
            {"l_schedule": "Linear"},
            "schedule",
            {"name": "linear", "r_init": 0.1, "r_end": 0.002},
        ),
        (
            {"l_schedule": "Cosine"},
            "schedule",
            {"name": "cosine", "r_init": 0.1, "r_end": 0.002},
        ),
        (
            {"l_end_ratio": "1/3200"},
            "schedule",
            {"name": "exponential", "r_init": 0.1, "r_end": 1 / 3200},
        ),
        ({"cfg_scale": 1}, "target", "conditional"),
        ({"cfg_scale": "absent", "mix_ratio": "absent"}, "target", "conditional"),
        (
            {"mix_ratio": 0},
            "target",
            {"name": "guided", "w": 3.0, "m": 0.0, "decay": 0.8, "drop": 0.1},
        ),
    ],
    ids=str,
)
def test_objectives_are_taken_over(given, part, expected):
    assert read(B4, **given).objective[part] == expected


@pytest.mark.parametrize(
    "given, words",
    [
        ({"noising_type": "linear"}, "'Linear'"),
        ({"noising_type": "Trigonometric"}, "noising_type"),
        ({"coefficient_type": "Eular"}, "'Euler'"),
        ({"model_type": "DiT-B/4"}, "'DiT-B-4'"),
        ({"model_type": ["UNet"]}, "model_type"),
        ({"l_schedule": "Exponential"}, "'Exponent'"),
        ({"mix_ration": 0.25}, "'mix_ratio'"),
        ({"eps": "absent"}, "lacks eps"),
        ({"l_init_ratio": "absent"}, "lacks l_init_ratio"),
        (
            {"cfg_drop_rate": "absent", "mix_ratio": None},
            "lacks mix_ratio, cfg_drop_rate",
        ),
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
    ],
    ids=str,
)
def test_settings_that_are_not_understood_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        read(B4, **given)


def test_every_key_is_known():
    "The list of the paper's code, each either mapped or said to have no meaning here."
    keys = """working_dir noising_type coefficient_type model_type dataset_type data_size dataset_path velocity_loss_ratio p eps time_mean time_std cfg_scale mix_ratio cfg_drop_rate cfg_decay_time l_schedule l_init_ratio l_end_ratio
              total_steps ema_decay_rate learning_rate betas weight_decay batch_size num_workers prefetch_factor eval_steps eval_batch_size eval_NFE eval_demo_steps eval_demo_shape ckpt_saving_steps logging_steps seed""".split()
    assert set(keys) == {*published.KEYS, *published.UNUSED} - {
        "optimizer"
    } and not set(published.KEYS) & set(published.UNUSED)


def test_load_config_reads_published_files(tmp_path):
    (tmp_path / "cifar.yaml").write_text(CIFAR10)
    assert load_config(str(tmp_path / "cifar.yaml")) == read(CIFAR10)
    (tmp_path / "bad.yml").write_text(CIFAR10.replace("Exponent", "exponent"))
    with pytest.raises(InputError, match="'Exponent'"):
        load_config(str(tmp_path / "bad.yml"))


# ---------------------------------------------------------------------------------------------------- checkpoints
def filled(network=TINY, seed=0):
    "A network in which every weight matters."
    net, g = build("network", network).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g)
                * (1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1)
                + (p.ndim == 1)
            )
    return net


def checkpoint(net, prefix="network.", **changes):
    ema = {prefix + name: value.clone() for name, value in net.state_dict().items()}
    return {
        "model": {name: value + 1 for name, value in ema.items()},
        "ema_model": ema,
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0)}},
            "param_groups": [{"lr": 1e-4}],
        },
        "finished_steps": 700,
        "finished_epochs": 2,
    } | changes


@pytest.mark.parametrize(
    "prefix", ["network.", "module.network.", "module._orig_mod.network.", ""]
)
def test_a_checkpoint_becomes_a_run(tmp_path, prefix):
    net, x1 = (
        filled(),
        torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    )
    torch.save(checkpoint(net, prefix), tmp_path / "700.pt")
    folder = import_published(
        tmp_path / "700.pt", CIFAR10, tmp_path / "run", network=TINY
    )
    run = load_run(folder)
    with torch.no_grad():
        assert torch.equal(
            sample(trained(run), x1), x1 - net(x1, torch.ones(3), torch.ones(3))
        )  # the averaged weights, not those in training
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "run.json",
        "log.csv",
    }
    assert (
        run.step,
        run.steps,
        run.config.optimiser,
        run.objective["eps"],
        run.log,
    ) == (700, 800_000, "radam", 0.001, [])
    assert asdict(run.config) == asdict(replace(read(CIFAR10), network=TINY))
    with pytest.raises(InputError, match="not trained further"):
        resume_run(folder)


def test_an_earlier_run_is_kept_and_other_folders_are_not_touched(tmp_path):
    torch.save(checkpoint(filled()), tmp_path / "700.pt")
    for _ in range(2):
        import_published(tmp_path / "700.pt", CIFAR10, tmp_path / "run", network=TINY)
    assert load_run(tmp_path / "run-1").step == load_run(tmp_path / "run").step == 700
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        import_published(tmp_path / "700.pt", CIFAR10, tmp_path / "mine", network=TINY)


def test_a_run_in_double_or_half_precision_is_written_as_the_network_wants_it(tmp_path):
    net = filled()
    torch.save(
        checkpoint(net.double(), finished_steps=torch.tensor(5)), tmp_path / "5.pt"
    )
    run = load_run(
        import_published(tmp_path / "5.pt", CIFAR10, tmp_path / "run", network=TINY)
    )
    assert run.step == 5 and all(
        value.dtype == torch.float32 for value in run.ema.values()
    )


def test_every_misfit_is_named(tmp_path):
    content = checkpoint(filled())
    ema, all_names = content["ema_model"], list(content["ema_model"])
    for name in all_names[:3]:
        del ema[name]
    ema |= {
        all_names[4]: torch.zeros(5),
        "network.more": torch.zeros(1),
        all_names[6]: torch.full_like(ema[all_names[6]], math.nan),
        all_names[7]: ema[all_names[7]].long(),
    }
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(InputError) as caught:
        import_published(tmp_path / "bad.pt", CIFAR10, tmp_path / "run", network=TINY)
    text = str(caught.value)
    assert (
        all(f"{own_name(name)} missing" in text for name in all_names[:3])
        and "more unknown" in text
        and f"{own_name(all_names[4])} has shape (5,)" in text
    )
    assert (
        f"{own_name(all_names[6])} is not finite" in text
        and f"{own_name(all_names[7])} holds torch.int64" in text
        and "in 7 of" in text
    )
    assert not (tmp_path / "run").exists()


def with_numpy(tmp_path):
    import numpy

    torch.save(checkpoint(filled(), finished_steps=numpy.int64(7)), tmp_path / "bad.pt")


def with_object(tmp_path):
    torch.save(checkpoint(filled(), optimizer=Path("x")), tmp_path / "bad.pt")


BAD = {
    "missing": (lambda at: None, "missing"),
    "a folder": (lambda at: (at / "bad.pt").mkdir(), "a folder"),
    "text": (
        lambda at: (at / "bad.pt").write_text("hello, this is text"),
        "no torch file",
    ),
    "empty": (lambda at: (at / "bad.pt").write_bytes(b""), "no torch file"),
    "numpy": (with_numpy, "holds the object numpy"),
    "objects": (with_object, "holds the object pathlib"),
    "a tensor": (lambda at: torch.save(torch.zeros(3), at / "bad.pt"), "holds Tensor"),
    "weights alone": (
        lambda at: torch.save(filled().state_dict(), at / "bad.pt"),
        "lacks model, ema_model",
    ),
    "no average": (
        lambda at: torch.save(
            {
                key: value
                for key, value in checkpoint(filled()).items()
                if key != "ema_model"
            },
            at / "bad.pt",
        ),
        "lacks ema_model",
    ),
    "no tensors": (
        lambda at: torch.save(
            checkpoint(filled(), ema_model={"network.a": 1.0}), at / "bad.pt"
        ),
        "something else than tensors",
    ),
    "steps": (
        lambda at: torch.save(checkpoint(filled(), finished_steps=-1), at / "bad.pt"),
        "finished_steps is -1",
    ),
    "twice": (
        lambda at: torch.save(
            checkpoint(
                filled(), ema_model={"network.a": torch.zeros(1), "a": torch.zeros(1)}
            ),
            at / "bad.pt",
        ),
        "same name",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_checkpoint_are_refused_and_an_earlier_run_stays(
    tmp_path, kind
):
    make, words = BAD[kind]
    torch.save(checkpoint(filled()), tmp_path / "good.pt")
    import_published(tmp_path / "good.pt", CIFAR10, tmp_path / "run", network=TINY)
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    make(tmp_path)
    with pytest.raises(InputError, match=words):
        import_published(tmp_path / "bad.pt", CIFAR10, tmp_path / "run", network=TINY)
    assert {
        file: file.read_bytes() for file in (tmp_path / "run").iterdir()
    } == before and not (tmp_path / "run-1").exists()


def test_cut_checkpoints_are_refused(tmp_path):
    torch.save(checkpoint(filled()), tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut or no torch file"):
            read_checkpoint(tmp_path / "cut.pt")
    torch.save(
        checkpoint(filled()), tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )  # the format before zip files
    assert read_checkpoint(tmp_path / "old.pt")["finished_steps"] == 700


def test_a_model_type_that_does_not_fit_is_refused(tmp_path):
    torch.save(checkpoint(filled()), tmp_path / "700.pt")
    with pytest.raises(InputError, match="does not fit the network unet"):
        import_published(tmp_path / "700.pt", CIFAR10, tmp_path / "run")
    with pytest.raises(InputError, match="does not fit the network dit"):
        import_published(tmp_path / "700.pt", B4, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_published_size_is_read(tmp_path):
    "A file with the names and shapes of the published U-Net, its tensors one number each in memory."
    shapes = json.loads((PARITY / "checkpoint_shapes.json").read_text())["UNet"]
    ema = {name: torch.full((), 0.5).expand(shape) for name, shape in shapes.items()}
    torch.save(checkpoint(filled(), ema_model=ema), tmp_path / "800000.pt")
    given = published.averaged(
        read_checkpoint(tmp_path / "800000.pt"), read(CIFAR10).network, "file"
    )
    assert len(given) == 425 and sum(value.numel() for value in given.values()) > 55.9e6
    ema["network.map_layer0.bias"] = torch.zeros(4)
    with pytest.raises(
        InputError, match=r"map_layer0.bias has shape \(4,\) instead of \(512,\)"
    ):
        published.averaged(checkpoint(filled(), ema_model=ema), "unet", "file")


# ---------------------------------------------------------------------------------------------------- parity
def numbers_of(net, name="made", r=0.2, B=6, seed=1, **settings):
    "A batch for a network, and what the plain formulas give for it in float64."
    g, o = torch.Generator().manual_seed(seed), net.options
    meta = {
        "network": "UNet",
        "noising": "Linear",
        "coefficients": "Euler",
        "guidance_scale": 1.0,
        "mix_ratio": 1.0,
        "decay_time": 1.0,
        "p": 0.75,
        "eps": 0.001,
        "r": r,
    } | settings
    t = 0.3 + 0.6 * torch.rand(B, generator=g)
    s = t * (0.2 + 0.5 * torch.rand(B, generator=g))
    x0, x1 = torch.randn(2, B, o["channels"], o["size"], o["size"], generator=g)
    given = {
        "x0": x0,
        "x1": x1,
        "t": t,
        "s": s,
        "l": towards(t, s, r),
        "cfg_mask": torch.arange(B) < 2,
    } | (
        {"augment_labels": torch.randn(B, o["augment"], generator=g)}
        if o["augment"]
        else {}
    )
    numbers = Numbers(name, meta, net.state_dict(), given, {})
    values = restated(numbers, copy.deepcopy(net).double())
    kept = [
        key
        for key in values
        if "/grad/" not in key
        or key.endswith(("conv.weight", "layer0.weight", "block0.conv0.weight"))
    ]
    return replace(numbers, results={key: values[key].float() for key in kept})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A file of numbers and what it holds."
    numbers = numbers_of(filled())
    return write_numbers(
        tmp_path_factory.mktemp("numbers") / "made.safetensors", numbers
    ), numbers


def test_the_public_numbers():
    "All of the U-Net; schedules; names and shapes."
    rows = parity(PARITY)
    assert passed(rows) and passed(parity(PARITY, only="unet"))
    unet = [row for row in rows if row.network == "unet"]
    assert (
        len(unet) == 17
        and all(row.ok for row in unet)
        and sum(row.network == "any" and row.ok for row in rows) == 7
    )
    assert {row.file for row in parity(PARITY, only="dit") if row.network == "dit"} == {
        "checkpoint_shapes",
        "dit_linear_euler_decay",
        "dit_linear_euler_guided",
        "dit_linear_euler_plain",
        "dit_trig_trig_guided",
    }


def test_the_plain_formulas_give_the_public_numbers():
    "So they may serve as an oracle where there is no public file."
    numbers = read_numbers(PARITY / "unet_linear_euler.safetensors")
    assert all(
        row.ok for row in compared(numbers, restated(numbers, model_of(numbers).net))
    )


SETTINGS = [
    ("Trig", "Trig", 1.0, 0.01),
    ("Linear", "Trig", 0.5, 0.01),
    ("Trig", "Euler", 0.25, 1e-4),
    ("Linear", "Euler", 2.0, 0.1),
    ("Triangular", "Triangular", 0.0, 0.01),
]


@pytest.mark.parametrize("noising, coefficients, p, eps", SETTINGS, ids=str)
def test_every_pair_of_path_and_coefficients(tmp_path, noising, coefficients, p, eps):
    numbers = numbers_of(
        filled(), noising=noising, coefficients=coefficients, p=p, eps=eps
    )
    rows = parity(write_numbers(tmp_path / "made.safetensors", numbers))
    assert passed(rows) and len(rows) == len(numbers.results) >= 20, parity_table(rows)


@pytest.mark.parametrize(
    "network",
    [
        {"blocks": 2, "multipliers": [2, 1, 2], "attention": [8, 2]},
        {"size": 16, "width": 24, "multipliers": [1], "attention": []},
        {"channels": 1, "augment": 0},
        {"classes": 3},
    ],
    ids=str,
)
def test_networks_of_any_size_are_read_off_their_tensors(tmp_path, network):
    network = TINY | network
    numbers = numbers_of(filled(network))
    assert (
        build("network", published.unet_options(numbers.weights)).spec()
        == build("network", network).spec()
    )
    assert passed(parity(write_numbers(tmp_path / "made.safetensors", numbers)))


def test_small_gaps(tmp_path):
    "Where some t - l is below 1e-3, gradients have another limit, and float64 is as near as rounding allows."
    numbers = numbers_of(filled(), r=0.02)
    given = numbers.given | {
        "l": torch.cat([numbers.given["t"][:1] - 1e-4, numbers.given["l"][1:]])
    }
    numbers = replace(numbers, given=given)
    net = model_of(numbers).net
    numbers = replace(
        numbers,
        results={
            key: value
            for key, value in restated(numbers, net).items()
            if key in numbers.results
        },
    )  # in float32, as a reference
    rows = parity(write_numbers(tmp_path / "made.safetensors", numbers))
    assert (
        passed(rows)
        and {row.limit for row in rows if row.group == "scm gradients"} == {2e-4}
        and {row.limit for row in rows if row.group == "fm gradients"} == {5e-6}
    )


def test_the_quotient_of_the_training_is_the_published_one_without_its_rounding():
    numbers = numbers_of(filled(), coefficients="Trig")
    model, d = (
        model_of(numbers).double(),
        {name: value.double() for name, value in numbers.given.items()},
    )
    extras = {"augment": d["augment_labels"]}
    rows = Rows(
        *model.path.interpolate(d["x0"], d["x1"], d["t"]),
        d["t"],
        d["s"],
        d["l"],
        extras=extras,
    )
    v = rows.v_cond
    Fl = output_ahead(model, rows, v)
    F = model.F(rows.xt, rows.t, rows.s, **extras)
    torch.testing.assert_close(
        published.published_quotient(model, rows, v, F, Fl),
        difference_quotient(model, rows.xt, rows.t, rows.s, rows.l, v, F, Fl),
        rtol=1e-9,
        atol=1e-9,
    )


WRONG = {
    "the constant of the norms": lambda net, meta: [
        setattr(part, "eps", 1e-5)
        for part in net.modules()
        if isinstance(part, nn.GroupNorm)
    ],
    "eps of the loss": lambda net, meta: meta.update(eps=0.0011),
    "p": lambda net, meta: meta.update(p=0.76),
    "the path": lambda net, meta: meta.update(noising="Trig"),
    "the coefficients": lambda net, meta: meta.update(coefficients="Trig"),
    "a weight": lambda net, meta: net.map_layer0.weight.data[0, 0].add_(1e-2),
    "t - s and t exchanged": lambda net, meta: net.map_layer0.weight.data.copy_(
        net.map_layer0.weight.data.roll(net.width * 2, 1)
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_mistakes_are_found(plain, kind):
    numbers = read_numbers(plain[0])
    net, meta = model_of(numbers).net, dict(numbers.meta)
    WRONG[kind](net, meta)
    changed = replace(numbers, meta=meta)
    model = published.SolutionModel(
        net,
        published.PATHS[meta["noising"]],
        published.COEFFICIENTS[meta["coefficients"]],
    )
    rows = compared(numbers, ours(changed, model))
    assert (
        not passed(rows)
        and "ABOVE" in parity_table(rows)
        and "is off by" in parity_table(rows)
    )
    assert passed(compared(numbers, ours(numbers, model_of(numbers))))


def test_a_number_that_is_none_fails(plain):
    numbers = read_numbers(plain[0])
    spoilt = replace(
        numbers, results=numbers.results | {"fm/mse": torch.tensor(math.nan)}
    )
    assert not passed(compared(spoilt, ours(spoilt, model_of(spoilt))))
    zero = replace(numbers, results={"scm/mse": torch.tensor(0.0)})
    assert (
        compared(zero, {"scm/mse": torch.tensor(1e-9)})[0].error == math.inf
        and compared(zero, {"scm/mse": torch.tensor(0.0)})[0].ok
    )


# ---- until the chapter on transformers exists, a plain one checks what only its files hold: labels, hidden labels, guidance
class Times(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class Layer(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        self.heads, self.attn = (
            heads,
            nn.ModuleDict(
                {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
            ),
        )
        self.mlp, self.adaLN_modulation = (
            nn.ModuleDict(
                {
                    "fc1": nn.Linear(width, ratio * width),
                    "fc2": nn.Linear(ratio * width, width),
                }
            ),
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
        )

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[
            :, None
        ].chunk(6, -1)
        q, k, v = (
            self.attn["qkv"](modulated(x, shift, scale))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        x = x + gate * self.attn["proj"](
            ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        return x + gate2 * self.mlp["fc2"](
            nn.functional.gelu(
                self.mlp["fc1"](modulated(x, shift2, scale2)), approximate="tanh"
            )
        )


def modulated(x, shift, scale):
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PlainDiT(nn.Module):
    def __init__(self, input, channels, patch, width, depth, heads, mlp_ratio, classes):
        super().__init__()
        self.classes, self.patch = classes, patch
        self.register_buffer("pos_embed", torch.zeros(1, (input // patch) ** 2, width))
        self.x_embedder, self.y_embedder = (
            nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)}),
            nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)}),
        )
        self.t_embedder, self.s_embedder, self.blocks = (
            Times(width),
            Times(width),
            nn.ModuleList(Layer(width, heads, mlp_ratio) for _ in range(depth)),
        )
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * channels),
                "adaLN_modulation": nn.Sequential(
                    nn.SiLU(), nn.Linear(width, 2 * width)
                ),
            }
        )

    def forward(self, x, t, d, y):
        c, side = (
            self.t_embedder(t)
            + self.s_embedder(d)
            + self.y_embedder["embedding_table"](y),
            x.shape[-1] // self.patch,
        )
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer["linear"](
            modulated(h, *self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1))
        )
        return (
            h.view(len(x), side, side, self.patch, self.patch, -1)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(x.shape)
        )


@pytest.fixture
def transformer(monkeypatch):
    if "dit" not in names("network"):
        monkeypatch.setitem(config_module._registered, ("network", "dit"), PlainDiT)


@pytest.mark.parametrize(
    "name",
    [
        "linear_euler_decay",
        "linear_euler_guided",
        "linear_euler_plain",
        "trig_trig_guided",
    ],
)
def test_public_numbers_with_guidance(transformer, name):
    rows = parity(PARITY / f"dit_{name}.safetensors", only="dit")
    assert passed(rows) and len(rows) == 18 and all(row.ok for row in rows), (
        parity_table(rows)
    )
    numbers = read_numbers(PARITY / f"dit_{name}.safetensors")
    assert all(
        row.ok for row in compared(numbers, restated(numbers, model_of(numbers).net))
    )
    if numbers.guided:  # w, m, the decay and the mask matter
        for change in (
            {"guidance_scale": 2.9},
            {"mix_ratio": 0.3},
            {"decay_time": 0.3},
        ):
            off = compared(
                numbers,
                ours(replace(numbers, meta=numbers.meta | change), model_of(numbers)),
            )
            assert {row.group for row in off if not row.ok} >= {
                "fm gradients",
                "scm gradients",
            }, change
        off = compared(
            numbers,
            ours(
                replace(
                    numbers,
                    given=numbers.given | {"cfg_mask": ~numbers.given["cfg_mask"]},
                ),
                model_of(numbers),
            ),
        )
        assert not passed(off) and all(row.ok for row in off if row.group == "outputs")


def test_m_of_zero_keeps_the_data_in_the_regression(transformer):
    "m = 0 for x_l only: the flow-matching loss keeps m = 1."
    numbers = read_numbers(PARITY / "dit_linear_euler_guided.safetensors")
    model = model_of(numbers)
    zero, one = (
        replace(numbers, meta=numbers.meta | {"mix_ratio": m}) for m in (0.0, 1.0)
    )
    assert all(
        row.ok
        for row in compared(
            replace(
                zero,
                results={
                    k: v
                    for k, v in restated(zero, model.net).items()
                    if k in numbers.results
                },
            ),
            ours(zero, model),
        )
    )
    a, b = ours(zero, model), ours(one, model)
    assert torch.equal(a["fm/surrogate"], b["fm/surrogate"]) and not torch.equal(
        a["scm/surrogate"], b["scm/surrogate"]
    )


# ---- bad input
@pytest.mark.parametrize(
    "what, words",
    [
        ("x1", "lacks x1"),
        ("fm/mse", "lacks fm/mse"),
        ("f(x1,1,0)", r"lacks f\(x1,1,0\)"),
        ("augment_labels", "lacks augment_labels"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, plain, what, words):
    numbers = plain[1]
    less = lambda table: {name: value for name, value in table.items() if name != what}
    with pytest.raises(InputError, match=words):
        parity(
            write_numbers(
                tmp_path / "less.safetensors",
                replace(
                    numbers, given=less(numbers.given), results=less(numbers.results)
                ),
            )
        )


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda n: replace(n, results=n.results | {"fm/more": torch.zeros(1)}),
            "fm/more, which",
        ),
        (
            lambda n: replace(n, given=n.given | {"extra": torch.zeros(1)}),
            "extra, which",
        ),
        (
            lambda n: replace(n, given=n.given | {"t": n.given["t"][:2]}),
            r"t has shape \(2,\)",
        ),
        (
            lambda n: replace(n, results=n.results | {"F(x1,t,s)": torch.zeros(1)}),
            r"F\(x1,t,s\) has shape",
        ),
        (
            lambda n: replace(
                n, results=n.results | {"fm/grad/nothing": torch.zeros(1)}
            ),
            "no such parameter",
        ),
        (
            lambda n: replace(
                n, weights={k: v for k, v in n.weights.items() if "map_layer0" not in k}
            ),
            "map_layer0.weight missing",
        ),
        (lambda n: replace(n, weights={"a": torch.zeros(1)}), "no U-Net"),
        (lambda n: replace(n, weights={}), "lacks weights"),
        (lambda n: replace(n, meta=n.meta | {"noising": "linear"}), "'Linear'"),
        (lambda n: replace(n, meta=n.meta | {"p": "half"}), "p is 'half'"),
        (lambda n: replace(n, meta={"network": "UNet"}), "lack noising"),
        (lambda n: replace(n, meta=n.meta | {"network": "MLP"}), "network"),
        (
            lambda n: replace(n, meta=n.meta | {"guidance_scale": 2.0}),
            "no labels to guide by",
        ),
    ],
)
def test_numbers_that_cannot_be_compared_are_refused(tmp_path, plain, make, words):
    with pytest.raises(InputError, match=words):
        parity(write_numbers(tmp_path / "bad.safetensors", make(plain[1])))


@pytest.mark.parametrize(
    "name, content, words",
    [
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
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        parity(tmp_path / name)


def test_missing_empty_and_cut(tmp_path, plain):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("nothing here")
    (tmp_path / "cut.safetensors").write_bytes(plain[0].read_bytes()[:-1000])
    for path, words in (
        (tmp_path / "lost", "is missing"),
        (tmp_path / "lost.json", "is missing"),
        (tmp_path / "empty", "holds no file of numbers"),
        (tmp_path / "cut.safetensors", "cut or no safetensors"),
        ([], "nothing to compare"),
        ([plain[0], tmp_path / "lost"], "is missing"),
    ):
        with pytest.raises(InputError, match=words):
            parity(path)
    with pytest.raises(InputError, match="'unet'"):
        parity(plain[0], only="unett")
    with pytest.raises(InputError, match="nothing to compare of the network dit"):
        parity(plain[0], only="dit")


def test_schedules_and_shapes_that_differ_are_found(tmp_path):
    numbers, shapes = (
        json.loads((PARITY / name).read_text())
        for name in ("schedules.json", "checkpoint_shapes.json")
    )
    numbers["r/Cosine"][3] += 1e-6
    numbers["guidance_decay/0.8"][-2] += 1e-6
    (tmp_path / "schedules.json").write_text(json.dumps(numbers))
    assert {row.what for row in parity(tmp_path) if row.ok is False} == {
        "r/Cosine",
        "guidance_decay/0.8",
    }
    shapes["UNet"]["network.map_layer0.bias"] = [511]
    (tmp_path / "shapes.json").write_text(json.dumps({"UNet": shapes["UNet"]}))
    rows = parity(tmp_path / "shapes.json")
    assert (
        [row.ok for row in rows] == [False] and not passed(rows) and rows[0].error == 2
    )  # theirs and ours


def test_the_reader_is_found_by_name():
    assert find("reader", "published") is read_published


def test_parity_passes_in_a_fresh_process():
    "Networks are imported when they are asked for: nothing may depend on what was imported before."
    done = program("soflow", "parity", PARITY, "--only", "unet")
    assert done.status == 0, done.said
    assert "ABOVE ITS" not in done.out and ", 0 above." in done.out
    assert soflow("parity", "nowhere").status == 2
