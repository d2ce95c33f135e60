"A comparison refuses what it cannot measure."

from helpers import complaint
from soflow_edu.comparing import compare
from soflow_edu.core import build
from soflow_edu.distributions import law_of
from soflow_edu.odes import ExactFlow
from soflow_edu.paths import LinearPath
from soflow_edu.solution import SolutionModel


def test_a_misspelt_metric_is_refused():
    model = SolutionModel(build("network", "mlp"))
    flow = ExactFlow(law_of("two_moons", 50), LinearPath())
    assert "one_step" in complaint(compare, model, flow, metrics=("one_stp",))
