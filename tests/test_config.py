"A configuration survives its own YAML, and refuses what it cannot mean."

import os
import stat
from pathlib import Path

import pytest

from faults import in_child
from helpers import complaint
from soflow_edu.config import (
    cache_root,
    fresh_folder,
    load_config,
    make_config,
    read_yaml,
    replacing,
    shipped_configs,
    to_yaml,
)
from soflow_edu.core import InputError


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_is_the_same_after_it_was_written(name):
    config = load_config(name)
    assert make_config(read_yaml(to_yaml(config))) == config


def test_a_misspelt_key_is_refused():
    assert "learning_rate" in complaint(make_config, {"lerning_rate": 1})


ENDLESS = {
    "a number": "steps: " + "9" * 2**17,
    "a word that begins as a number": "data: " + "9" * 2**17 + "a",
    "an exponent": "learning_rate: 1e" + "9" * 2**17,
    "nesting": "imports: " + "[" * 2**17,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_refused_or_read_at_once(name):
    def read():
        try:
            return bool(read_yaml(ENDLESS[name]))
        except InputError:
            return False

    ended = in_child(read, seconds=20)
    assert ended.how == "done", ended.said


def test_an_unknown_configuration_is_refused():
    assert "plane" in complaint(load_config, "plain")


def test_a_batch_that_cannot_be_cut_is_refused():
    given = {"steps": 1, "batch": 10, "accumulate": 4}
    assert "multiple" in complaint(make_config, given)


# ------------------------------------------------------------------------ files
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "table.txt") as path:
            path.chmod(0o600)  # as some writers leave it
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "table.txt").stat().st_mode)
    assert mode == 0o666 & ~umask


@pytest.mark.parametrize("name", ["run_12:30:00", "a: b", "plain"])
def test_a_colon_in_a_path_is_a_part_of_it(tmp_path, monkeypatch, name):
    path = tmp_path / name / "config.yaml"
    path.parent.mkdir()
    path.write_text("steps: 3\n")
    monkeypatch.chdir(tmp_path)
    for given in (path, str(path), f"{name}/config.yaml"):
        assert read_yaml(given) == {"steps": 3}
    assert read_yaml("steps: 3") == {"steps": 3}


def test_a_folder_with_nothing_but_what_a_killed_run_left_is_fresh(tmp_path):
    (tmp_path / ".checkpoint.safetensors.x1y2.safetensors").write_bytes(b"half")
    assert fresh_folder(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be made" in complaint(fresh_folder, tmp_path / "file" / "run")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "SOFLOW_DATA" in complaint(cache_root)
