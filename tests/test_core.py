"The registry, its catalogue, and components of one's own."

import json
import shutil
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

import book
import digests
from helpers import complaint, python, train_to_end
from soflow_edu import core
from soflow_edu.config import Config
from soflow_edu.core import build, catalogue, describe, find
from soflow_edu.distributions import law_of
from soflow_edu.training import trained


# ------------------------------------------------------------------------ catalogue
@pytest.mark.parametrize("kind", catalogue())
def test_every_name_of_the_catalogue_is_found(kind):
    for name in catalogue()[kind]:
        assert find(kind, name) is not None


def needs_nothing(builder) -> bool:
    "Whether a component can be built without something that only an experiment gives."
    parameters = signature(builder).parameters.values()
    return all(parameter.default is not parameter.empty for parameter in parameters)


DESCRIBED = ("path", "times", "coefficients", "schedule", "objective")


@pytest.mark.parametrize("kind", DESCRIBED)
def test_what_is_built_by_name_can_be_described_and_built_again(kind):
    builders = {name: find(kind, name) for name in catalogue()[kind]}
    alone = [name for name, builder in builders.items() if needs_nothing(builder)]
    assert alone
    for name in alone:
        description = describe(build(kind, name))
        again = build(kind, description)
        assert describe(again) == description


def test_options_that_a_component_does_not_have_are_refused():
    assert "lam" in complaint(build, "objective", {"name": "soflow", "lamda": 1})


# ------------------------------------------------------------------------ digests
@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    "A copy of the package, which the digests are made to read."
    copy = tmp_path / "soflow_edu"
    shutil.copytree(book.PACKAGE, copy)
    monkeypatch.setattr(digests, "PACKAGE", copy)
    return copy


def enter(package: Path, kind: str, name: str, module: str):
    "Adds an entry to the catalogue of a copy of the package."
    path = package / "catalogue.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries[kind][name] = module
    path.write_text(json.dumps(entries), encoding="utf-8")


def test_a_new_entry_of_the_catalogue_concerns_only_code_that_names_it(package):
    ways = {
        "another name": ['build("path", "linear")'],
        "an import": ["from soflow_edu.paths import LinearPath"],
        "all networks": ['names("network")'],
        "its name": ['build("path", "my_path")'],
        "all paths": ['names("path")'],
    }
    before = {way: digests.digest(code) for way, code in ways.items()}
    enter(package, "path", "my_path", "paths")
    changed = [way for way, code in ways.items() if digests.digest(code) != before[way]]
    assert changed == ["its name", "all paths"]


# ------------------------------------------------------------------------ own parts
MY_PARTS = """
"Components of my own."

from dataclasses import dataclass

import torch
from torch import nn

from soflow_edu.core import register
from soflow_edu.flow_matching import FlowMatching
from soflow_edu.paths import LinearPath
from soflow_edu.toys import points


@register("path", "my_path")
@dataclass(frozen=True)
class MyPath(LinearPath):
    "The straight path under another name."


@register("network", "my_network")
class MyNetwork(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.inlet = nn.Linear(4, width)
        self.outlet = nn.Linear(width, 2)

    def spec(self):
        return {"name": "my_network", "width": self.width}

    def forward(self, x, t, d, y=None):
        h = self.inlet(torch.cat([x, t[:, None], d[:, None]], 1))
        return self.outlet(nn.functional.silu(h))


@points("my_square", classes=1)
def my_square(n, generator):
    return torch.rand(n, 2, generator=generator), torch.zeros(n).long()


@register("objective", "my_objective")
@dataclass
class MyObjective(FlowMatching):
    "Flow matching under another name."
"""

# What a process says of a run that it has loaded.
SAY = """
def say(run):
    import json, torch
    from soflow_edu import build, law_of
    objective = build("objective", run.config.objective)
    law = law_of(run.config.data)
    parts = [run.model.net, run.model.path, objective, law]
    names = [type(part).__name__ for part in parts]
    ends = run.model(torch.ones(2, 2), 1.0, 0.0)
    print(json.dumps({"names": names, "step": run.step, "ends": ends.tolist()}))
"""
HERE = """
from soflow_edu import load_run
say(load_run("run"))
"""
ELSEWHERE = """
from soflow_edu import import_components, load_run
from soflow_edu.core import refusal
print(" ".join(refusal(load_run, "../run").split()))
import_components(["../my_parts.py"])
say(load_run("../run"))
"""


def forget(module: str, prefix: str):
    "Makes this process forget a file of components, whose names begin with a prefix."
    del sys.modules[module]
    del core._imported_files[module]
    own = [key for key in core._registered if key[1].startswith(prefix)]
    for key in own:
        del core._registered[key]


@pytest.fixture
def ends_of_my_run(tmp_path, monkeypatch):
    "Where a run with parts of one's own ends; it lies in tmp_path, beside its parts."
    (tmp_path / "my_parts.py").write_text(MY_PARTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = Config(
        data="my_square",
        path="my_path",
        network={"name": "my_network", "width": 6},
        objective="my_objective",
        steps=2,
        batch=8,
        imports=["my_parts.py"],
    )
    step = train_to_end(config, law_of(config.data), out="run")
    yield trained(step.run)(torch.ones(2, 2), 1.0, 0.0)
    forget("my_parts", "my_")


def check_loaded(line: str, ends: torch.Tensor):
    said = json.loads(line)
    assert said["names"] == ["MyNetwork", "MyPath", "MyObjective", "FiniteSet"]
    assert said["step"] == 2
    torch.testing.assert_close(torch.tensor(said["ends"]), ends)


def test_a_new_process_in_the_same_folder_finds_the_parts_of_a_run(
    tmp_path, ends_of_my_run
):
    done = python("-c", SAY + HERE, folder=tmp_path)
    assert done.status == 0, done.said
    check_loaded(done.out, ends_of_my_run)


def test_from_another_folder_the_parts_are_asked_for_and_can_be_given(
    tmp_path, ends_of_my_run
):
    (tmp_path / "elsewhere").mkdir()
    done = python("-c", SAY + ELSEWHERE, folder=tmp_path / "elsewhere")
    assert done.status == 0, done.said
    asked, loaded = done.out.splitlines()
    assert "my_parts.py is missing" in asked
    assert "Start from the folder that holds it" in asked
    assert "--import FILE" in asked
    check_loaded(loaded, ends_of_my_run)
