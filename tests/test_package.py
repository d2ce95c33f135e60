"The package: its metadata, what its imports cost, and its wheel."

import json
import re
import statistics
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import book
import soflow_edu
from helpers import ROOT, cpu_seconds, program, python

MODULES = book.modules(ROOT)
IMPORTS = "import " + ", ".join(f"soflow_edu.{name}" for name in MODULES)
HEAVY = (
    "sklearn",
    "torchdiffeq",
    "scipy",
    "matplotlib",
    "ipywidgets",
    "anywidget",
    "nbdev",
    "fastcore",
)


# ------------------------------------------------------------------------ metadata
def test_metadata_comes_from_settings_ini():
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    stated = settings["DEFAULT"]
    assert version("soflow_edu") == stated["version"]
    assert soflow_edu.__version__ == stated["version"]
    assert metadata("soflow_edu")["Summary"] == stated["description"]


# ------------------------------------------------------------------------ imports
RUNS = {
    "torch": ("-c", "import torch"),
    "all modules": ("-c", IMPORTS),
    "soflow --help": ("-m", "soflow_edu", "--help"),
}


@pytest.mark.slow
def test_imports_cost_little_beside_torch():
    "Medians of the ratios of neighbours, in runs that take turns."
    ratios = {name: [] for name in RUNS}
    for _ in range(3):
        seconds = {name: cpu_seconds(*words) for name, words in RUNS.items()}
        for name in RUNS:
            ratios[name].append(seconds[name] / seconds["torch"])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    assert max(medians.values()) <= 1.3, medians


def test_heavy_libraries_are_not_imported():
    found = f"[name for name in {HEAVY} if name in sys.modules]"
    done = python("-c", f"import sys; {IMPORTS}; print({found})")
    assert done.status == 0, done.said
    assert done.out.strip() == "[]"


# ------------------------------------------------------------------------ types
TYPED = """
import soflow_edu as so
from soflow_edu.flow_matching import FlowMatching
from soflow_edu.guidance import Guided
from soflow_edu.objectives import ConsistencyTraining, MeanFlow, Shortcut, Staged
from soflow_edu.protocols import Objective, Target
from soflow_edu.soflow import BatchVelocity, Conditional, Exact, OwnVelocity

law = so.law_of("two_moons")
config = so.make_config({})
model, _ = so.assemble(config)
objectives: list[Objective] = [
    so.assemble(config)[1], FlowMatching(), MeanFlow(), ConsistencyTraining(),
    Shortcut(), Staged(),
]
for objective in objectives:
    so.train(model, objective, law, config)
exact = Exact(so.ExactFlow(law, model.path))
targets: list[Target] = [Conditional(), OwnVelocity(), BatchVelocity(), exact, Guided()]
"""
WRONG = "\nso.train(model, 3, law, config)\n"


def python_examples() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def test_types_hold_for_those_who_use_the_package(tmp_path):
    "Pyright accepts the README's examples and each part, and sees a wrong one."
    programs = {"readme": python_examples(), "parts": TYPED, "wrong": TYPED + WRONG}
    for name, code in programs.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    settings = {"typeCheckingMode": "basic", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    options = ("--outputjson", "--pythonpath", sys.executable, "--project", tmp_path)
    done = program("pyright", *options)
    found = json.loads(done.out)["generalDiagnostics"]
    places = [f"{Path(row['file']).stem}: {row['message']}" for row in found]
    assert len(places) == 1 and places[0].startswith("wrong"), places


# ------------------------------------------------------------------------ wheel
@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "-q", "-w", folder)
    done = python("-m", "pip", "wheel", ROOT, *options, folder=ROOT)
    assert done.status == 0, done.said
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_modules_and_configurations_and_no_tests(wheel):
    names = wheel.namelist()
    assert "soflow_edu/configs/plane.yaml" in names
    assert {f"soflow_edu/{name}.py" for name in MODULES} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "nbs", "data"))]


def test_the_wheel_holds_the_films_and_they_are_small(wheel):
    folder = "soflow_edu/frames/"
    frames = [part for part in wheel.infolist() if part.filename.startswith(folder)]
    names = {Path(part.filename).name for part in frames}
    assert {"eight_gaussians.safetensors", "SHA256SUMS"} <= names
    assert sum(part.file_size for part in frames) < 1_000_000


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    wheel.extractall(site)
    where = "import soflow_edu; print(soflow_edu.__file__)"
    done = python("-c", where, folder=tmp_path, PYTHONPATH=str(site))
    assert done.status == 0 and str(site) in done.out, done.said
    demo = ("-m", "soflow_edu", "demo", "--seconds", "2")
    done = python(*demo, folder=tmp_path, PYTHONPATH=str(site))
    assert done.status == 0, done.said
    assert (tmp_path / "runs/demo/figure.png").stat().st_size > 50_000
