"What the network of a solution model is given, and which times are refused."

import pytest
import torch
from torch import nn

from helpers import complaint
from soflow_edu.core import build
from soflow_edu.solution import SolutionModel


class Probe(nn.Module):
    "A network that keeps the times it was given."

    def forward(self, x, t, d, y=None):
        self.seen = torch.stack([t, d])
        return x


def test_the_network_is_given_t_and_t_minus_s():
    probe = Probe()
    t = torch.tensor([0.9, 0.5])
    s = torch.tensor([0.2, 0.4])
    SolutionModel(probe)(torch.zeros(2, 2), t, s)
    torch.testing.assert_close(probe.seen, torch.tensor([[0.9, 0.5], [0.7, 0.1]]))


def test_misspelt_coefficients_are_refused():
    assert "euler" in complaint(build, "coefficients", "eular")


@pytest.mark.parametrize(
    "t, s, hint",
    [
        (0.1, 0.5, "s <= t"),
        (1.5, 0.5, "<= 1"),
        (torch.ones(3), 0.5, "2 samples"),
    ],
    ids=["backwards", "beyond the noise", "another count"],
)
def test_times_that_make_no_jump_are_refused(t, s, hint):
    model = SolutionModel(build("network", "mlp"))
    assert hint in complaint(model, torch.zeros(2, 2), t, s)
