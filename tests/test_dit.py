"The diffusion transformer: public numbers, published shapes, autocast, compiling, checkpointing."
import json
from pathlib import Path

import pytest
import torch

from soflow_edu import dit, published
from soflow_edu.config import make_config
from soflow_edu.core import InputError, build
from soflow_edu.dit import MODELS, DiT, positions
from soflow_edu.published import parity, parity_table, passed, read_numbers
from soflow_edu.solution import SolutionModel
from soflow_edu.training import advance, assemble, begin

PARITY = Path(__file__).parent / "parity"
TINY = {"name": "dit", "size": 8, "width": 48, "depth": 2, "heads": 4, "classes": 10}


def awake(seed=0, **options):
    "A transformer in which no layer is zero."
    net, g = build("network", TINY, **options), torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return net.eval()


def inputs(B=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 4, 8, 8, generator=g), torch.linspace(0.2, 1, B), torch.linspace(0, 0.5, B), torch.arange(B)


def test_the_public_numbers():
    rows = [row for row in parity(PARITY, only="dit") if row.network == "dit"]
    assert passed(rows) and len(rows) == 4 * 18 + 5, parity_table(rows)


@pytest.mark.parametrize("name", MODELS)
def test_published_names_and_shapes(name):
    shapes = json.loads((PARITY / "checkpoint_shapes.json").read_text())[f"DiT-{name.replace('/', '-')}"]
    with torch.device("meta"): own = DiT(name).state_dict()
    assert {f"network.{key}": list(value.shape) for key, value in own.items()} == shapes


def test_positions_are_the_public_ones():
    "The files hold the table, which would otherwise cover ours when their weights are loaded."
    theirs = read_numbers(PARITY / "dit_linear_euler_plain.safetensors").weights["pos_embed"]
    torch.testing.assert_close(positions(48, 4), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("what", ["patches", "gate", "heads"])
def test_a_mistake_would_be_seen(what, monkeypatch):
    "Parity fails if rows and columns are swapped, a gate is left out, or heads are split wrongly."
    split, options = dit.unpatched, published.dit_options
    if what == "patches": monkeypatch.setattr(dit, "unpatched", lambda tokens, patch: split(tokens, patch).transpose(2, 3))
    if what == "gate": monkeypatch.setattr(dit.TransformerBlock, "forward", lambda self, h, c: h + self.attn(dit.modulated(h, *self.adaLN_modulation(c).chunk(6, 1)[:2])))
    if what == "heads": monkeypatch.setattr(published, "dit_options", lambda *given: options(*given) | {"heads": 2})
    numbers = read_numbers(PARITY / "dit_linear_euler_plain.safetensors")
    values = published.ours(numbers, published.model_of(numbers))
    assert not passed([row for row in published.compared(numbers, values) if row.group == "outputs"])


def test_bfloat16_computes_inside_and_answers_in_float32():
    x, t, d, y = inputs()
    model = SolutionModel(awake(), "linear", "euler")
    exact = model.F(x, t, t - d, y)
    model.precision, seen = "bfloat16", set()
    model.net.blocks[0].attn.qkv.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    rough = model.F(x, t, t - d, y)
    assert seen == {torch.bfloat16} and rough.dtype == torch.float32 and 1e-5 < (rough - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("changes, objective", [({"compile": True}, "flow_matching"), ({"network": TINY | {"depth": 1, "checkpointing": True}}, {"name": "soflow", "target": "guided"})], ids=["compiled", "checkpointed"])
def test_compiled_and_checkpointed_steps_are_the_same(changes, objective):
    "Each graph takes the compiler half a minute, so flow matching, which has one, stands for the others."
    ends, one = [], TINY | {"depth": 1}
    for change in ({}, changes):
        config = make_config({"steps": 2, "batch": 4, "network": one, "objective": objective} | change)
        model, made = assemble(config)
        for p, other in zip(model.net.parameters(), awake(depth=1).parameters()): p.data.copy_(other)
        run = begin(model, made, config)
        advance(run, made, Latent())
        ends.append(torch.cat([w.flatten() for w in run.model.state_dict().values()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=2e-5)


class Latent:
    def sample(self, n, generator): return torch.randn(n, 4, 8, 8, generator=generator), torch.arange(n) % 10


@pytest.mark.parametrize("options, words", [({"model": "B/8"}, "Unknown size of a DiT"), ({"patch": 3}, "cannot be cut"), ({"heads": 5}, "cannot be shared"), ({"width": 6, "heads": 2}, "multiple of 4"), ({"depth": 0}, "at least 1"), ({"classes": 0}, "at least 1")])
def test_what_cannot_be_built_is_refused(options, words):
    with pytest.raises(InputError, match=words): build("network", TINY | options)
