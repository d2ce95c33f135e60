"Equality with numbers that the public code of the paper computes."

import json

import pytest
import torch

from helpers import PARITY
from soflow_edu.consistency import towards
from soflow_edu.core import build

NUMBERS = json.loads((PARITY / "schedules.json").read_text(encoding="utf-8"))
SCHEDULES = {  # by the names of the public code
    "Const": {"name": "constant", "r_end": 0.002},
    "Linear": {"name": "linear", "r_init": 0.1, "r_end": 0.002},
    "Cosine": {"name": "cosine", "r_init": 0.1, "r_end": 0.002},
    "Exponent": {"name": "exponential", "r_init": 0.1, "r_end": 0.002},
}


@pytest.mark.parametrize("public", SCHEDULES)
def test_a_schedule_gives_the_public_share_of_the_jump(public):
    schedule = build("schedule", SCHEDULES[public])
    t = torch.ones(1)
    s = torch.zeros(1)
    steps = range(0, 101, 10)  # of 100
    for step, theirs in zip(steps, NUMBERS[f"r/{public}"], strict=True):
        ours = 1 - towards(t, s, schedule(step / 100)).item()
        assert abs(ours - theirs) < 6e-8
