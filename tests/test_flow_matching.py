"The network for points refuses inputs that do not fit."

import torch

from helpers import complaint
from soflow_edu.core import build
from soflow_edu.solution import SolutionModel


def test_points_of_another_dimension_are_refused():
    model = SolutionModel(build("network", "mlp"))
    assert "(2, 3)" in complaint(model, torch.zeros(2, 3), 1.0, 0.5)


def test_labels_for_a_network_without_classes_are_refused():
    net = build("network", "mlp")
    labels = torch.zeros(2).long()
    said = complaint(net, torch.zeros(2, 2), torch.ones(2), torch.ones(2), labels)
    assert "classes" in said
