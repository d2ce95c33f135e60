"The restated published step and ours: the same mathematics, measured in turns."

import json

import pytest
import torch
from torch.nn import functional

from helpers import soflow
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
TRANSFORMER = {
    "name": "dit",
    "size": 8,
    "patch": 2,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "classes": 5,
}
LONG = {"name": "constant", "r_end": 0.5}  # steps for which both quotients are exact


def awake(model):
    "The model with weights that are nowhere zero."
    for p in model.parameters():
        g = torch.Generator().manual_seed(p.numel())
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_close(a, b, rtol=1e-3, atol=1e-4):  # atol: a share of the largest of a
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol * a.abs().max().item())


def test_the_published_settings():
    config = step_config("UNet", 4)
    assert config.network == load_config("cifar10-published").network
    assert config.network["width"] == 128 and config.optimiser == "radam"
    assert config.objective["lam"] == 0 and config.objective["p"] == 0.75


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="UNet"):
        step_config("Unet", 4)
    with pytest.raises(InputError, match="at least 1"):
        bench_step(SMALL, batch=0)


def test_attention_written_out_equals_packed_and_is_put_back():
    block = awake(AttentionBlock(8, 8, 16))
    x = torch.randn(2, 8, 4, 4)
    e = torch.randn(2, 16)
    tokens = awake(Attention(16, 2))
    other = torch.randn(2, 5, 16)
    packed = block(x, e)
    also = tokens(other)
    before = functional.scaled_dot_product_attention
    with written_out():
        assert functional.scaled_dot_product_attention is not before
        torch.testing.assert_close(block(x, e), packed)
        torch.testing.assert_close(tokens(other), also)
    assert functional.scaled_dot_product_attention is before


def gradient_of_ours(config):
    model, objective = assemble(config)
    run = begin(awake(model), objective, config)
    gradient(run, objective, Noise(model.net.options), 0, config.batch)
    return flat(p.grad for p in model.parameters())


def gradient_restated(config):
    model, objective = assemble(config)
    run = begin(awake(model), objective, config)
    data = Noise(model.net.options)
    x0, _, extras = data.sample(config.batch, generator_of(config.seed, 0))
    g = generator_of(config.seed, 0, stream=1)
    draws = objective.draw(Batch(x0), 0.0, g)
    seed = number_of(config.seed, 0, 0, 0, 2)
    with written_out(unet.dropped):
        batch = Batch(x0, None, extras)
        restated_loss(run.model, objective, batch, draws, seed).backward()
    return flat(p.grad for p in model.parameters())


def test_the_restated_consistency_loss_has_half_our_gradient_with_the_same_dropout():
    config = step_config(SMALL, 8)
    assert_close(gradient_of_ours(config), 2 * gradient_restated(config))


def test_the_share_of_the_velocity_counts_once():
    model = awake(assemble(step_config(SMALL | {"dropout": 0.0}, 8))[0])
    weight = model.net.map_layer0.weight
    batch = Batch(torch.randn(8, 3, 8, 8))
    o = SoFlow(lam=0.5, p=0.0, eps=0.01)
    draws = o.draw(batch, 0.2, torch.Generator().manual_seed(0))

    ours = torch.autograd.grad(o.loss(model, batch, draws, 0.2).value, weight)[0]
    loss = restated_loss(model, o, batch, draws, 0)
    theirs = torch.autograd.grad(loss, weight)[0]
    assert not torch.allclose(ours, theirs, rtol=0.05)
    assert not torch.allclose(ours, 2 * theirs, rtol=0.05)

    # lam : (1 - lam) / 2 is one to one, as with equal shares of ours, but for 2/3
    o.lam = 1 / 3
    loss = restated_loss(model, o, batch, draws, 0)
    theirs = torch.autograd.grad(loss, weight)[0]
    assert_close(ours, 1.5 * theirs)


def test_a_restated_step_moves_weights_and_average():
    config = step_config(SMALL, 4)
    model, objective = assemble(config)
    run = begin(model, objective, config)
    before = {name: value.clone() for name, value in run.ema.items()}
    restated_step(run, objective, Noise(model.net.options))
    assert run.step == 1
    assert any(not torch.equal(before[name], run.ema[name]) for name in before)
    name = "net.dec.8x8_aux_conv.weight"
    moved = before[name].lerp(model.state_dict()[name], 1e-4)
    torch.testing.assert_close(run.ema[name], moved)


def test_the_transformers_are_guided_as_published():
    config = step_config(TRANSFORMER, 8)
    guided = {"name": "guided", "w": 3.0, "m": 0.25, "decay": 0.8, "drop": 0.1}
    assert config.objective["target"] == guided and config.precision == "float32"


@pytest.mark.parametrize(("lam", "factor"), [(0.0, 2), (1.0, 1)])
def test_the_restated_guided_loss_has_our_gradient(lam, factor):
    config = step_config(TRANSFORMER, 8)
    config.objective |= {"lam": lam, "schedule": LONG}
    model, objective = assemble(config)
    weights = list(awake(model).parameters())
    x0, y = Noise(model.net.options).sample(8, generator_of(config.seed, 0))
    batch = Batch(x0, y)
    draws = objective.draw(batch, 0.0, torch.Generator().manual_seed(1))
    draws.dropped[:2] = True  # rows of both kinds in both parts
    draws.dropped[-2:] = torch.tensor([False, True])

    value = objective.loss(model, batch, draws, 0.0).value
    ours = torch.autograd.grad(value, weights, allow_unused=True)
    with written_out():
        value = restated_loss(model, objective, batch, draws, 0)
        theirs = torch.autograd.grad(value, weights, allow_unused=True)

    largest = max(g.abs().max().item() for g in ours if g is not None)
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            close = {"rtol": 1e-3, "atol": 1e-5 * largest}
            torch.testing.assert_close(a, factor * b, **close)


@pytest.mark.parametrize("network", [SMALL, TRANSFORMER], ids=["unet", "dit"])
def test_an_optimiser_that_goes_one_by_one_steps_alike(network):
    config = step_config(network, 2)
    moved = []
    for plain in (False, True):
        model, objective = assemble(config)
        run = begin(awake(model), objective, config)
        if plain:
            run.optimiser = one_by_one(run.optimiser)
        for _ in range(2):
            for p in model.parameters():
                p.grad = p.detach().cos()
            run.optimiser.step()
        moved.append(flat(model.parameters()))
    torch.testing.assert_close(*moved)
    options = run.optimiser.param_groups[0]
    assert options["foreach"] is False and not options.get("fused")


def test_each_kind_of_step_is_measured_as_often_as_asked():
    rows = bench_step(SMALL, batch=2, steps=3, compiled=False)
    assert [row.name for row in rows] == ["restated", "ours"]
    assert all(len(row.seconds) == 3 and row.megabytes > 0 for row in rows)


def test_times_are_shown_and_written(tmp_path):
    restated = StepTimes("restated", [2.0, 4.0, 6.0], 10)
    ours = StepTimes("ours", [1.0, 3.0, 6.0], 8)
    lines = step_table([restated, ours]).splitlines()
    assert lines[2].split() == ["ours", "3.000", "0.750", "0.750", "8"]
    write_times(tmp_path / "times.json", [restated, ours], {"network": "UNet"})
    written = json.loads((tmp_path / "times.json").read_text())
    assert written["network"] == "UNet" and written["steps"][1]["median"] == 3.0


def test_the_command_refuses_before_it_works():
    done = soflow("bench", "step", "--network", "Unet")
    assert done.status == 2 and "UNet" in done.err
    assert "Traceback" not in done.err
