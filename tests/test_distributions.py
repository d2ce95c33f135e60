"Laws refuse data that they cannot use."

import torch

from helpers import complaint
from soflow_edu.distributions import FiniteSet, law_of


def test_a_misspelt_data_set_is_refused():
    assert "eight_gaussians" in complaint(law_of, "eight_gausians")


def test_an_empty_set_is_refused():
    assert "empty" in complaint(FiniteSet, torch.empty(0, 2))


def test_data_that_are_not_numbers_are_refused():
    assert "NaN" in complaint(FiniteSet, torch.full((3, 2), torch.nan))
