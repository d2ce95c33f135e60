"The exact map keeps its laws, and solvers refuse what they cannot use."

import pytest
import torch

from helpers import complaint
from soflow_edu.core import build
from soflow_edu.distributions import FiniteSet, law_of
from soflow_edu.odes import ExactFlow, integrate
from soflow_edu.paths import LinearPath, TrigPath
from soflow_edu.solution import SolutionModel, semigroup_defect


@pytest.mark.parametrize("path", [LinearPath(), TrigPath()], ids=["linear", "trig"])
def test_the_exact_map_keeps_the_semigroup_in_many_dimensions(path):
    generator = torch.Generator().manual_seed(0)
    data = FiniteSet(torch.randn(20, 2, 4, 4, generator=generator))
    x1 = torch.randn(5, 2, 4, 4, generator=generator).double()
    t = torch.full((5,), 1.0).double()
    l = torch.full((5,), 0.4).double()
    s = torch.full((5,), 0.1).double()
    flow = ExactFlow(data, path)
    assert semigroup_defect(flow.solution, x1, t, l, s) < 1e-4


def test_an_unknown_solver_is_refused():
    model = SolutionModel(build("network", "mlp"))
    said = complaint(integrate, model, torch.zeros(2, 2), 1.0, 0.0, method="rk45")
    assert "rk4" in said


def test_the_exact_map_does_not_go_back():
    flow = ExactFlow(law_of("two_moons", 50), LinearPath())
    said = complaint(flow.solution, torch.zeros(2, 2), 0.0, 1.0)
    assert "cannot go back" in said
