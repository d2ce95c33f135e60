"The rungs of the ladder, and what they refuse."

import pytest
import torch

from helpers import complaint, soflow
from soflow_edu.config import load_config, make_config
from soflow_edu.digits import Pictures
from soflow_edu.ladder import evaluate_run, judge_pictures, rungs, train_run

SOURCES = ("measured", "published", "estimated")


def test_every_rung_says_its_hardware_and_its_minutes():
    for rung in rungs().values():
        assert rung.minutes > 0 and rung.hardware


def test_the_ladder_goes_from_the_plane_to_the_longest_published_runs():
    names = list(rungs())
    assert set(names[:2]) == {"plane", "digits"}
    assert set(names[-2:]) == {"cifar10-published", "imagenet-xl2"}


def test_every_expectation_is_a_band_with_a_source():
    for rung in rungs().values():
        for expected in rung.expected:
            assert expected.low < expected.high
            assert expected.source in SOURCES


def test_a_rung_holds_its_configuration():
    assert rungs()["plane"].config == load_config("plane")


@pytest.fixture(scope="module")
def map_of_the_plane(tmp_path_factory):
    config = make_config({"data": "eight_gaussians", "steps": 2, "batch": 8})
    return train_run(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize(
    "option",
    [{"steps": 4}, {"against": "digits"}, {"features": "digits"}, {"sampler": "jump"}],
    ids=str,
)
def test_options_that_a_map_of_the_plane_has_no_use_for_are_refused(
    map_of_the_plane, option
):
    assert "Leave out" in complaint(evaluate_run, map_of_the_plane, **option)


def test_pictures_whose_data_set_names_no_features_ask_for_some():
    x = 2 * torch.rand(4, 1, 8, 8) - 1
    y = torch.zeros(4).long()
    nameless = Pictures("bars", x, y, x, y, ["all"])
    said = complaint(judge_pictures, x, nameless)
    assert "bars names no features" in said
    assert "random_filters" in said


def test_points_of_many_dimensions_are_judged_by_their_exact_flow(tmp_path):
    words = ("train", "d32", "steps=4", "batch=16", "--out", "run")
    assert soflow(*words, folder=tmp_path).status == 0
    done = soflow("evaluate", "run", folder=tmp_path)
    assert done.status == 0 and "dopri5, exact velocity" in done.out
    assert "expects nothing of this evaluation" in done.said
    done = soflow("sample", "run", "--grid", "grid.png", folder=tmp_path)
    assert done.status == 0 and (tmp_path / "grid.png").exists()
