"The diffusion transformer: public numbers, shapes, autocast, compiler, checkpoints."

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
PLAIN = PARITY / "dit_linear_euler_plain.safetensors"


def awake(seed=0, **options):
    "A transformer in which no layer is zero."
    net = build("network", TINY, **options)
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return net.eval()


def inputs(B=3):
    "Latents, times, lengths of jumps and labels."
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, 4, 8, 8, generator=g)
    t = torch.linspace(0.2, 1, B)
    d = torch.linspace(0, 0.5, B)
    return x, t, d, torch.arange(B)


def test_the_public_numbers():
    rows = [row for row in parity(PARITY, only="dit") if row.network == "dit"]
    assert passed(rows), parity_table(rows)
    assert len(rows) == 4 * 18 + 5, parity_table(rows)


@pytest.mark.parametrize("name", MODELS)
def test_published_names_and_shapes(name):
    published_shapes = json.loads((PARITY / "checkpoint_shapes.json").read_text())
    shapes = published_shapes[f"DiT-{name.replace('/', '-')}"]
    with torch.device("meta"):
        own = DiT(name).state_dict()
    found = {f"network.{key}": list(value.shape) for key, value in own.items()}
    assert found == shapes


def test_positions_are_the_public_ones():
    "Loaded weights bring a table of their own, which would cover ours."
    theirs = read_numbers(PLAIN).weights["pos_embed"]
    torch.testing.assert_close(positions(48, 4), theirs, rtol=0, atol=1e-7)


right_unpatched = dit.unpatched
right_options = published.dit_options


def swapped(tokens, patch):
    "Rows and columns of the picture exchanged."
    return right_unpatched(tokens, patch).transpose(2, 3)


def without_gate(self, h, c):
    "A block that adds its attention whole, and leaves out the rest."
    shift, scale = self.adaLN_modulation(c).chunk(6, 1)[:2]
    return h + self.attn(dit.modulated(h, shift, scale))


def with_two_heads(*given):
    return right_options(*given) | {"heads": 2}


MISTAKES = {
    "patches": (dit, "unpatched", swapped),
    "gate": (dit.TransformerBlock, "forward", without_gate),
    "heads": (published, "dit_options", with_two_heads),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_would_be_seen(what, monkeypatch):
    "Parity fails if axes are swapped, a gate is left out, or heads are split wrongly."
    monkeypatch.setattr(*MISTAKES[what])
    numbers = read_numbers(PLAIN)
    values = published.ours(numbers, published.model_of(numbers))
    rows = published.compared(numbers, values)
    assert not passed([row for row in rows if row.group == "outputs"])


def test_bfloat16_computes_inside_and_answers_in_float32():
    x, t, d, y = inputs()
    model = SolutionModel(awake(), "linear", "euler")
    exact = model.F(x, t, t - d, y)
    model.precision = "bfloat16"
    seen = set()

    def note_type(module, given, out):
        seen.add(out.dtype)

    model.net.blocks[0].attn.qkv.register_forward_hook(note_type)
    rough = model.F(x, t, t - d, y)
    assert seen == {torch.bfloat16}
    assert rough.dtype == torch.float32
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.03


class Latent:
    "A data set of noise with labels."

    def sample(self, n, generator):
        x = torch.randn(n, 4, 8, 8, generator=generator)
        return x, torch.arange(n) % 10


ONE_BLOCK = TINY | {"depth": 1}
COMPILED = ({"compile": True}, "flow_matching")
CHECKPOINTED = (
    {"network": ONE_BLOCK | {"checkpointing": True}},
    {"name": "soflow", "target": "guided"},
)


def weights_after_two_steps(settings):
    "All weights of a run that starts from the numbers of `awake`."
    config = make_config({"steps": 2, "batch": 4, "network": ONE_BLOCK} | settings)
    model, objective = assemble(config)
    start = awake(depth=1).parameters()
    for p, number in zip(model.net.parameters(), start, strict=True):
        p.data.copy_(number)
    run = begin(model, objective, config)
    advance(run, objective, Latent())
    weights = run.model.state_dict().values()
    return torch.cat([weight.flatten() for weight in weights])


@pytest.mark.parametrize(
    "changes, objective",
    [
        pytest.param(*COMPILED, id="compiled", marks=pytest.mark.slow),
        pytest.param(*CHECKPOINTED, id="checkpointed"),
    ],
)
def test_compiled_and_checkpointed_steps_are_the_same(changes, objective):
    """Each graph takes the compiler half a minute.

    So flow matching, which has one, stands for the others."""
    plain = weights_after_two_steps({"objective": objective})
    changed = weights_after_two_steps({"objective": objective} | changes)
    torch.testing.assert_close(plain, changed, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "B/8"}, "Unknown size of a DiT"),
        ({"patch": 3}, "cannot be cut"),
        ({"heads": 5}, "cannot be shared"),
        ({"width": 6, "heads": 2}, "multiple of 4"),
        ({"depth": 0}, "at least 1"),
        ({"classes": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build("network", TINY | options)
