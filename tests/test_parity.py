"Equality with numbers that the public code of the paper computes."
import json
from pathlib import Path

import pytest
import torch

from soflow_edu.core import build
from soflow_edu.consistency import towards

NUMBERS = json.loads((Path(__file__).parent / "parity/schedules.json").read_text())
SCHEDULES = {"Const": {"name": "constant", "r_end": 0.002}} | {public: {"name": name, "r_init": 0.1, "r_end": 0.002} for public, name in (("Linear", "linear"), ("Cosine", "cosine"), ("Exponent", "exponential"))}


@pytest.mark.parametrize("public", SCHEDULES)
def test_schedules(public):
    schedule, one = build("schedule", SCHEDULES[public]), torch.ones(1)
    ours = [1 - towards(one, 0 * one, schedule(k / 100)).item() for k in range(0, 101, 10)]
    assert max(abs(a - b) for a, b in zip(ours, NUMBERS[f"r/{public}"], strict=True)) < 6e-8
