"The restated published step and ours: the same mathematics, measured in turns."

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from soflow_edu import unet
from soflow_edu.config import load_config
from soflow_edu.core import InputError
from soflow_edu.cost import (
    Noise,
    StepTimes,
    bench_step,
    one_by_one,
    restated_loss,
    restated_step,
    step_config,
    step_table,
    write_times,
    written_out,
)
from soflow_edu.dit import Attention
from soflow_edu.flow_matching import Batch
from soflow_edu.soflow import SoFlow
from soflow_edu.training import assemble, begin, generator_of, gradient, number_of
from soflow_edu.unet import AttentionBlock

SMALL = {
    "name": "unet",
    "size": 8,
    "width": 16,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention": [8],
    "dropout": 0.3,
}


def awake(model):
    for p in model.parameters():
        p.data.copy_(
            0.1
            * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        )
    return model


def test_the_published_settings():
    config = step_config("UNet", 4)
    assert (
        config.network == load_config("cifar10-published").network
        and config.network["width"] == 128
        and config.optimiser == "radam"
        and config.objective["lam"] == 0
        and config.objective["p"] == 0.75
    )
    with pytest.raises(InputError, match="UNet"):
        step_config("Unet", 4)
    with pytest.raises(InputError, match="at least 1"):
        bench_step(SMALL, batch=0)


def test_attention_written_out_equals_packed_and_is_put_back():
    block, x, e = (
        awake(AttentionBlock(8, 8, 16)),
        torch.randn(2, 8, 4, 4),
        torch.randn(2, 16),
    )
    tokens, other = awake(Attention(16, 2)), torch.randn(2, 5, 16)
    packed, also, before = (
        block(x, e),
        tokens(other),
        functional.scaled_dot_product_attention,
    )
    with written_out():
        assert functional.scaled_dot_product_attention is not before
        torch.testing.assert_close(block(x, e), packed)
        torch.testing.assert_close(tokens(other), also)
    assert functional.scaled_dot_product_attention is before


def test_the_restated_consistency_loss_has_half_our_gradient_with_the_same_dropout():
    config, gradients = step_config(SMALL, 8), {}
    model, objective = assemble(config)
    data = Noise(model.net.options)
    for name in ("ours", "restated"):
        run = begin(awake(assemble(config)[0]), objective, config)
        if name == "ours":
            gradient(run, objective, data, 0, 8)
        else:
            x0, _, extras = data.sample(8, generator_of(config.seed, 0))
            draws = objective.draw(
                Batch(x0), 0.0, generator_of(config.seed, 0, stream=1)
            )
            with written_out(unet.dropped):
                restated_loss(
                    run.model,
                    objective,
                    Batch(x0, None, extras),
                    draws,
                    number_of(config.seed, 0, 0, 0, 2),
                ).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    torch.testing.assert_close(
        gradients["ours"],
        2 * gradients["restated"],
        rtol=1e-3,
        atol=1e-4 * gradients["ours"].abs().max().item(),
    )


def test_the_share_of_the_velocity_counts_once():
    model = awake(assemble(step_config(SMALL | {"dropout": 0.0}, 8))[0])
    batch, o = Batch(torch.randn(8, 3, 8, 8)), SoFlow(lam=0.5, p=0.0, eps=0.01)
    draws = o.draw(batch, 0.2, torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(
        o.loss(model, batch, draws, 0.2).value, model.net.map_layer0.weight
    )[0]
    theirs = torch.autograd.grad(
        restated_loss(model, o, batch, draws, 0), model.net.map_layer0.weight
    )[0]
    assert not torch.allclose(ours, theirs, rtol=0.05) and not torch.allclose(
        ours, 2 * theirs, rtol=0.05
    )
    o.lam = (
        1 / 3
    )  # lam : (1 - lam) / 2 is then one to one, as with equal shares of ours, but for a factor of 2/3
    theirs = torch.autograd.grad(
        restated_loss(model, o, batch, draws, 0), model.net.map_layer0.weight
    )[0]
    torch.testing.assert_close(
        1.5 * theirs, ours, rtol=1e-3, atol=1e-4 * ours.abs().max().item()
    )


def test_a_restated_step_moves_weights_and_average():
    config = step_config(SMALL, 4)
    model, objective = assemble(config)
    run = begin(model, objective, config)
    before = {name: value.clone() for name, value in run.ema.items()}
    restated_step(run, objective, Noise(model.net.options))
    assert run.step == 1 and any(
        not torch.equal(before[name], run.ema[name]) for name in before
    )
    name = "net.dec.8x8_aux_conv.weight"
    torch.testing.assert_close(
        run.ema[name], before[name].lerp(model.state_dict()[name], 1e-4)
    )


TRANSFORMER = {
    "name": "dit",
    "size": 8,
    "patch": 2,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "classes": 5,
}


@pytest.mark.parametrize(("lam", "factor"), [(0.0, 2), (1.0, 1)])
def test_the_restated_guided_loss_has_our_gradient(lam, factor):
    config = step_config(TRANSFORMER, 8)
    assert (
        config.objective["target"]
        == {"name": "guided", "w": 3.0, "m": 0.25, "decay": 0.8, "drop": 0.1}
        and config.precision == "float32"
    )
    config.objective |= {"lam": lam, "schedule": {"name": "constant", "r_end": 0.5}}
    model, objective = assemble(config)
    awake(model)
    run, (x0, y) = (
        begin(model, objective, config),
        Noise(model.net.options).sample(8, generator_of(config.seed, 0)),
    )
    draws = objective.draw(Batch(x0, y), 0.0, torch.Generator().manual_seed(1))
    draws.dropped[:2], draws.dropped[-2:] = (
        True,
        torch.tensor([False, True]),
    )  # rows of both kinds in both parts
    ours = torch.autograd.grad(
        objective.loss(model, Batch(x0, y), draws, 0.0).value,
        list(model.parameters()),
        allow_unused=True,
    )
    with written_out():
        theirs = torch.autograd.grad(
            restated_loss(run.model, objective, Batch(x0, y), draws, 0),
            list(model.parameters()),
            allow_unused=True,
        )
    for a, b in zip(ours, theirs):
        if a is not None:
            torch.testing.assert_close(
                a,
                factor * b,
                rtol=1e-3,
                atol=1e-5 * max(g.abs().max().item() for g in ours if g is not None),
            )


def test_an_optimiser_that_goes_one_by_one_steps_alike():
    for network in (SMALL, TRANSFORMER):
        config, moved = step_config(network, 2), []
        for plain in (False, True):
            model, objective = assemble(config)
            run = begin(awake(model), objective, config)
            if plain:
                run.optimiser = one_by_one(run.optimiser)
            for _ in range(2):
                for p in model.parameters():
                    p.grad = p.detach().cos()
                run.optimiser.step()
            moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        torch.testing.assert_close(*moved)
        assert run.optimiser.param_groups[0][
            "foreach"
        ] is False and not run.optimiser.param_groups[0].get("fused")


def test_rows_and_table(tmp_path):
    rows = bench_step(SMALL, batch=2, steps=3, compiled=False)
    assert [row.name for row in rows] == ["restated", "ours"] and all(
        len(row.seconds) == 3 and row.megabytes > 0 for row in rows
    )
    made = [
        StepTimes("restated", [2.0, 4.0, 6.0], 10),
        StepTimes("ours", [1.0, 3.0, 6.0], 8),
    ]
    assert step_table(made).splitlines()[2].split() == [
        "ours",
        "3.000",
        "0.750",
        "0.750",
        "8",
    ]
    write_times(tmp_path / "times.json", made, {"network": "UNet"})
    assert (
        json.loads((tmp_path / "times.json").read_text())["steps"][1]["median"] == 3.0
    )


def test_the_command_refuses_before_it_works(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "soflow_edu", "bench", "step", "--network", "Unet"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "UNet" in done.stderr
        and "Traceback" not in done.stderr
    )
