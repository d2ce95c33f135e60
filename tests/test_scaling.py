"Counts of work and memory, plans, batches and commands."

import subprocess
from dataclasses import replace

import pytest
import torch

from soflow_edu.config import load_config, make_config
from soflow_edu.core import InputError
from soflow_edu.dit import DiT
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


def calls(objective, monkeypatch):
    "Rows that a loss sends through the network, with a gradient weighted threefold."
    from soflow_edu.flow_matching import Batch
    from soflow_edu.solution import SolutionModel

    net, seen = DiT(size=8, patch=4, width=16, depth=1, heads=2, classes=3), []
    forward = net.forward
    monkeypatch.setattr(
        net,
        "forward",
        lambda x, *given, **named: (
            seen.append(len(x) * (3 if torch.is_grad_enabled() else 1))
            or forward(x, *given, **named)
        ),
    )
    model, batch = (
        SolutionModel(net, "linear", "euler"),
        Batch(torch.randn(8, 4, 8, 8), torch.randint(3, (8,))),
    )
    objective.loss(
        model, batch, objective.draw(batch, 0.0, torch.Generator().manual_seed(0)), 0.0
    )
    return sum(seen) / 8


@pytest.mark.parametrize(
    "target", ["conditional", "guided", {"name": "guided", "m": 1.0}, "own"]
)
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.75, 1.0])
def test_evaluations_are_those_of_the_loss(lam, target, monkeypatch):
    for jumps in (1, 3):
        objective = SoFlow(lam=lam, target=target, jumps=jumps)
        assert evaluations(objective) == calls(objective, monkeypatch)


def test_what_is_not_known_is_refused():
    for objective in ("meanflow", "semigroup", {"name": "staged"}):
        with pytest.raises(InputError, match="only those of SoFlow"):
            evaluations(objective)
    with pytest.raises(InputError, match="transformers"):
        step_flops(load_config("cifar10-published"))


def test_what_is_kept_is_what_a_real_pass_keeps():
    options, kept = (
        {
            "name": "dit",
            "size": 8,
            "patch": 2,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "classes": 3,
        },
        {},
    )
    net = DiT(**{name: value for name, value in options.items() if name != "name"})
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x}) or x, lambda x: x
    ):
        net(torch.randn(5, 4, 8, 8), torch.rand(5), torch.rand(5))
    real = sum(
        x.untyped_storage().nbytes() for key, x in kept.items() if key not in own
    )
    assert abs(kept_bytes(options, 5) / real - 1) < 0.02
    assert kept_bytes(options | {"checkpointing": True}, 5) < 0.5 * real


def test_published_sizes():
    b4, xl = load_config("imagenet-b4"), load_config("imagenet-xl2")
    assert step_flops(xl) > 15 * step_flops(b4) and step_flops(
        replace(b4, batch=512)
    ) == 2 * step_flops(b4)
    one, many = (step_memory(replace(b4, precision="float32"), n) for n in (1, 64))
    assert (
        many.activations == 64 * one.activations
        and many.state
        == one.state
        == 20 * sum(p.numel() for p in DiT("B/4").parameters())
    )
    assert "DiT-XL-2" in plan_table("A100", (8,))
    with pytest.raises(InputError, match="H100"):
        plan_table("H10")
    with pytest.raises(InputError, match="share"):
        plan_table(share=0)


def test_another_batch_sees_the_same_pictures():
    config = load_config("imagenet-b4")
    other = rescaled(config, 64)
    assert (
        other.steps * 64 == config.steps * 256
        and abs(other.learning_rate - 5e-5) < 1e-12
        and abs(other.ema**4 - config.ema) < 1e-9
    )
    with pytest.raises(InputError, match="budget"):
        rescaled(make_config({"seconds": 10}), 64)
    with pytest.raises(InputError, match="batch"):
        rescaled(config, 0)


def test_commands():
    assert launch_text("imagenet-b4", 1).startswith(
        "soflow train"
    ) and "--nproc-per-node 8" in launch_text("imagenet-b4", 8)
    script = launch_text("imagenet-b2", 64)
    assert (
        "#SBATCH --nodes=8" in script
        and subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    )
    for gpus, words in ((0, "GPUs"), (12, "multiple"), (3, "shared")):
        with pytest.raises(InputError, match=words):
            launch_text("imagenet-b4", gpus)
    assert "runs/my " not in launch_text(
        "imagenet-b4", 8, out="a b"
    ) and "'a b'" in launch_text("imagenet-b4", 8, out="a b")
    with pytest.raises(InputError, match="imagenet"):
        launch_text("imagenet-b5")
