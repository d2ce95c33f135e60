"A toy is a law: its points are drawn one by one, and so are their classes."

import pytest
import torch

from soflow_edu.core import names
from soflow_edu.toys import toy

QUICK = [name for name in names("data") if name != "word"]
SEVERAL = [name for name in QUICK if toy(name).classes > 1]


def draws(name: str, rounds: int, n: int):
    "Points and labels of many draws."
    for seed in range(rounds):
        yield toy(name).draw(n, torch.Generator().manual_seed(seed))


def variance_over_binomial(counts: torch.Tensor, n: int) -> float:
    "Variance of counts of n points over that of tossing a coin; NaN for no variance."
    share = counts.mean() / n
    return (counts.var() / (n * share * (1 - share))).item()


@pytest.mark.parametrize("name", SEVERAL)
def test_the_count_of_a_class_is_chance(name):
    counts = [
        torch.bincount(y, minlength=toy(name).classes) for _, y in draws(name, 300, 64)
    ]
    for of_class in torch.stack(counts).float().T:
        assert 0.65 < variance_over_binomial(of_class, 64) < 1.35


@pytest.mark.parametrize("name", QUICK)
def test_the_count_of_a_part_is_chance(name):
    "Also within a class: points do not stand at equal distances along a curve."
    x, y = toy(name).draw(4096, torch.Generator().manual_seed(0))
    half = x[y == 0, 0].median()
    counts = [(x[y == 0, 0] < half).sum() for x, y in draws(name, 300, 64)]
    assert 0.65 < variance_over_binomial(torch.stack(counts).float(), 64) < 1.35


@pytest.mark.parametrize("name", names("data"))
@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_number_of_points(name, n):
    x, y = toy(name).draw(n, torch.Generator().manual_seed(0))
    assert x.shape == (n, 2) and y.shape == (n,)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
