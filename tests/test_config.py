"A configuration survives its own YAML, and refuses what it cannot mean."

import pytest

from helpers import complaint
from soflow_edu.config import (
    load_config,
    make_config,
    read_yaml,
    shipped_configs,
    to_yaml,
)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_is_the_same_after_it_was_written(name):
    config = load_config(name)
    assert make_config(read_yaml(to_yaml(config))) == config


def test_a_misspelt_key_is_refused():
    assert "learning_rate" in complaint(make_config, {"lerning_rate": 1})


def test_an_unknown_configuration_is_refused():
    assert "plane" in complaint(load_config, "plain")


def test_a_batch_that_cannot_be_cut_is_refused():
    given = {"steps": 1, "batch": 10, "accumulate": 4}
    assert "multiple" in complaint(make_config, given)
