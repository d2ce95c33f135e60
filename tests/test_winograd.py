"Winograd's convolution: the library's numbers, and the library where it cannot serve."

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from soflow_edu import winograd
from soflow_edu.core import build
from soflow_edu.unet import Conv

WIDE = {
    "name": "unet",
    "size": 16,
    "width": 128,
    "multipliers": [1],
    "blocks": 1,
    "attention": [],
    "dropout": 0.0,
    "augment": 0,
}


def awake(net, seed=0):
    "Every convolution at full size, so that every part matters."
    torch.manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
    return net.eval()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def relative(ours, theirs):
    ours = ours.detach().double()
    return ((ours - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture
def counted(monkeypatch):
    "The shapes for which `pays` said yes."
    yes = []
    pays = winograd.pays

    def pays_and_notes(x, weight):
        answer = pays(x, weight)
        if answer:
            yes.append(x.shape)
        return answer

    monkeypatch.setattr(winograd, "pays", pays_and_notes)
    return yes


def answers_of(net, x, t, d):
    "The answer of a network, and all gradients of its mean square."
    net.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(x, t, d)
    y.square().mean().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *gradients]


def test_the_answers_and_gradients_of_the_library(counted, monkeypatch):
    net = awake(build("network", WIDE)).to(memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(0)
    t = torch.rand(4, generator=g)
    x = channels_last(torch.randn(4, 3, 16, 16, generator=g))
    d = t * torch.rand(4, generator=g)
    with torch.inference_mode():  # scratch memory made here must serve a training, too
        first = net(x, t, d)
    ours = answers_of(net, x, t, d)
    taken = len(counted)
    assert taken == 20 and torch.equal(first, ours[0])
    monkeypatch.setattr(Conv, "algorithm", "library")
    library = answers_of(net, x, t, d)
    assert len(counted) == taken and not torch.equal(ours[0], library[0])
    for a, b in zip(ours, library, strict=True):
        assert relative(a, b) < 3e-5


# More and less than the pixels of one part.
SHAPES = [(1, 128, 32, 32), (9, 160, 16, 30), (3, 128, 24, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_in_parts(shape):
    x = torch.randn(shape).permute(0, 2, 3, 1).contiguous().requires_grad_()
    w = torch.randn(130, shape[1], 3, 3, requires_grad=True)
    slope = torch.randn(*x.shape[:3], 130)
    library = functional.conv2d(x.double().permute(0, 3, 1, 2), w.double(), padding=1)
    library = library.permute(0, 2, 3, 1)
    ours = winograd.winograd(x, w)
    assert relative(ours, library) < 2e-6
    our_slopes = torch.autograd.grad(ours, (x, w), slope)
    their_slopes = torch.autograd.grad(library, (x, w), slope.double())
    for a, b in zip(our_slopes, their_slopes, strict=True):
        assert relative(a, b) < 2e-6


def test_where_it_cannot_be_taken_the_library_is(counted):
    conv = Conv(128, 128).to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(4, 128, 16, 16))
    conv(x)
    assert len(counted) == 1
    value, slope = torch.func.jvp(conv, (x,), (x,))  # linear but for its bias
    torch.testing.assert_close(slope, value - conv.bias[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    conv(x.contiguous())
    conv(channels_last(x[:, :, :8, :8]))
    copy.deepcopy(conv).double()(x.double())
    assert len(counted) == 1


def test_in_a_compiled_network(counted):
    conv = Conv(128, 128).to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(4, 128, 16, 16))
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    given = compiled(x)
    library = functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(given, library, atol=1e-4, rtol=1e-4)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), conv.weight)[0] for y in (given, library)
    )
    assert relative(ours, theirs) < 1e-5 and not torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel, size", [(3, 16), (3, 15), (1, 16)])
def test_the_registered_convolutions_agree(kernel, size):
    conv = Conv(128, 130, kernel).to(memory_format=torch.channels_last)
    nn.init.normal_(conv.bias)
    x = channels_last(torch.randn(5, 128, size, size))
    ours = conv(x)
    conv.algorithm = "library"
    library = conv(x)
    torch.testing.assert_close(ours, library, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours, library) == (kernel == 1 or size == 15)
