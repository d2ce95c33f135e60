"Counts of work and memory, plans, batches and commands."

import subprocess
from dataclasses import replace

import pytest
import torch

from soflow_edu.config import load_config, make_config
from soflow_edu.core import InputError
from soflow_edu.dit import DiT
from soflow_edu.flow_matching import Batch
from soflow_edu.scaling import (
    evaluations,
    kept_bytes,
    launch_text,
    plan_table,
    rescaled,
    step_flops,
    step_memory,
)
from soflow_edu.soflow import SoFlow
from soflow_edu.solution import SolutionModel

TARGETS = ["conditional", "guided", {"name": "guided", "m": 1.0}, "own"]
SMALL = {"size": 8, "patch": 2, "width": 32, "depth": 2, "heads": 2, "classes": 3}


class CountingDiT(DiT):
    "A transformer that counts the rows it is given; with gradient, threefold."

    rows = 0

    def forward(self, x, *given, **named):
        self.rows += len(x) * (3 if torch.is_grad_enabled() else 1)
        return super().forward(x, *given, **named)


def evaluations_of_a_loss(objective):
    "Rows that a loss sends through the network, for each sample."
    net = CountingDiT(size=8, patch=4, width=16, depth=1, heads=2, classes=3)
    model = SolutionModel(net, "linear", "euler")
    batch = Batch(torch.randn(8, 4, 8, 8), torch.randint(3, (8,)))
    draws = objective.draw(batch, 0.0, torch.Generator().manual_seed(0))
    objective.loss(model, batch, draws, 0.0)
    return net.rows / 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.75, 1.0])
def test_evaluations_are_those_of_the_loss(lam, target):
    for jumps in (1, 3):
        objective = SoFlow(lam=lam, target=target, jumps=jumps)
        assert evaluations(objective) == evaluations_of_a_loss(objective)


@pytest.mark.parametrize("objective", ["meanflow", "semigroup", {"name": "staged"}])
def test_other_objectives_are_refused(objective):
    with pytest.raises(InputError, match="only those of SoFlow"):
        evaluations(objective)


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="transformers"):
        step_flops(load_config("cifar10-published"))


def bytes_of_a_real_pass(net, batch):
    "What a forward pass keeps for its backward pass, weights apart."
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no other comes there
        return x

    def unpack(x):
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        net(torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.rand(batch))
    others = [x for place, x in kept.items() if place not in weights]
    return sum(x.untyped_storage().nbytes() for x in others)


def test_what_is_kept_is_what_a_real_pass_keeps():
    real = bytes_of_a_real_pass(DiT(**SMALL), 5)
    options = SMALL | {"name": "dit"}
    assert abs(kept_bytes(options, 5) / real - 1) < 0.02
    assert kept_bytes(options | {"checkpointing": True}, 5) < 0.5 * real


def test_work_of_published_sizes():
    b4 = load_config("imagenet-b4")
    xl = load_config("imagenet-xl2")
    assert step_flops(xl) > 15 * step_flops(b4)
    assert step_flops(replace(b4, batch=512)) == 2 * step_flops(b4)


def test_memory_of_published_sizes():
    b4 = replace(load_config("imagenet-b4"), precision="float32")
    one = step_memory(b4, 1)
    many = step_memory(b4, 64)
    assert many.activations == 64 * one.activations
    assert many.state == one.state
    assert one.state == 20 * sum(p.numel() for p in DiT("B/4").parameters())
    assert one.total == one.state + kept_bytes(DiT("B/4").spec(), 1)


@pytest.mark.slow
def test_a_plan():
    assert "DiT-XL-2" in plan_table("A100", (8,))
    assert plan_table("A100") != plan_table()
    assert "!" in plan_table("RTX 4090", (1,)).splitlines()[4]
    with pytest.raises(InputError, match="H100"):
        plan_table("H10")
    with pytest.raises(InputError, match="efficiency"):
        plan_table(efficiency=0)


def test_another_batch_sees_the_same_pictures():
    config = load_config("imagenet-b4")
    other = rescaled(config, 64)
    assert other.steps * 64 == config.steps * 256
    assert abs(other.learning_rate - 5e-5) < 1e-12
    assert abs(other.ema**4 - config.ema) < 1e-9
    with pytest.raises(InputError, match="budget"):
        rescaled(make_config({"seconds": 10}), 64)
    with pytest.raises(InputError, match="batch"):
        rescaled(config, 0)


def test_commands_for_one_machine():
    assert launch_text("imagenet-b4", 1).startswith("soflow train")
    assert "--nproc-per-node 8" in launch_text("imagenet-b4", 8)


def test_commands_for_several_machines():
    script = launch_text("imagenet-b2", 64)
    assert "#SBATCH --nodes=8" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True)
    assert checked.returncode == 0


def test_a_folder_with_a_space_is_quoted():
    text = launch_text("imagenet-b4", 8, out="a b")
    assert "runs/my " not in text
    assert "'a b'" in text


@pytest.mark.parametrize("gpus, words", [(0, "GPUs"), (12, "multiple"), (3, "shared")])
def test_gpus_that_cannot_be_used_are_refused(gpus, words):
    with pytest.raises(InputError, match=words):
        launch_text("imagenet-b4", gpus)


def test_an_unknown_configuration_is_refused():
    with pytest.raises(InputError, match="imagenet"):
        launch_text("imagenet-b5")
