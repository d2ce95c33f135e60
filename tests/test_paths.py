"Paths and laws of times refuse what they cannot use."

import torch

from helpers import complaint
from soflow_edu.core import build
from soflow_edu.paths import LinearPath


def test_a_misspelt_path_is_refused():
    assert "linear" in complaint(build, "path", "linaer")


def test_data_and_noise_of_other_shapes_are_refused():
    data = torch.zeros(3, 2)
    noise = torch.zeros(4, 2)
    said = complaint(LinearPath().interpolate, data, noise, torch.zeros(3))
    assert "(4, 2)" in said


def test_times_in_two_corners_that_overlap_are_refused():
    corners = {"name": "corner", "t1": 0.9, "s0": 0.9}
    assert "sum of at most 1" in complaint(build, "times", corners)
