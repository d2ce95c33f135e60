"Samplers keep the law of an exact map."

import pytest
import torch

from helpers import complaint
from soflow_edu.core import build
from soflow_edu.distributions import GaussianMixture
from soflow_edu.odes import ExactFlow
from soflow_edu.paths import LinearPath, TrigPath
from soflow_edu.sampling import sample
from soflow_edu.solution import SolutionModel


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", [LinearPath(), TrigPath()], ids=["linear", "trig"])
def test_renoising_keeps_the_law_of_the_exact_map(path):
    "For one Gaussian three steps give its mean and its spread."
    law = GaussianMixture(torch.tensor([[2.0, -1.0]]), torch.tensor([0.3]))
    x1 = torch.randn(20_000, 2, generator=seeded(0))
    x0 = sample(ExactFlow(law, path), x1, 3, generator=seeded(1))
    torch.testing.assert_close(x0.mean(0), law.means[0], atol=0.02, rtol=0)
    torch.testing.assert_close(x0.std(0), law.stds[0], atol=0.01, rtol=0)


def test_a_misspelt_sampler_is_refused():
    model = SolutionModel(build("network", "mlp"))
    assert "jump" in complaint(sample, model, torch.zeros(2, 2), 1, "jmup")
