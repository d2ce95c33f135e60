"The package: metadata, imports, registry, wheel."
import os
import resource
import statistics
import subprocess
import sys
import zipfile
from inspect import signature
from configparser import ConfigParser
from importlib.metadata import metadata, version
from pathlib import Path

from soflow_edu.config import CATALOGUE
from soflow_edu.core import build, describe, find

ROOT = Path(__file__).parent.parent
PLANE = "config paths toys distributions odes flow_matching solution comparing consistency sampling training objectives guidance diagnosis widgets grading cli".split()


def cpu_seconds(*arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_metadata_comes_from_settings_ini():
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    assert version("soflow_edu") == settings["DEFAULT"]["version"]
    assert metadata("soflow_edu")["Summary"] == settings["DEFAULT"]["description"]
    import soflow_edu

    assert soflow_edu.__version__ == settings["DEFAULT"]["version"]


def test_imports_cost_little_beside_torch():
    "Medians of ratios of neighbours, in alternating runs: all modules of the plane, and `soflow --help`, beside torch."
    runs = {"torch": ("-c", "import torch"), "plane": ("-c", "import " + ", ".join(f"soflow_edu.{name}" for name in PLANE)), "help": ("-m", "soflow_edu", "--help")}
    times = {name: [] for name in runs}
    for _ in range(3):
        for name, arguments in runs.items():
            times[name].append(cpu_seconds(*arguments))
    ratio = {name: statistics.median(own / torch for own, torch in zip(times[name], times["torch"])) for name in ("plane", "help")}
    print(times, ratio)
    assert max(ratio.values()) <= 1.3


def test_heavy_libraries_are_not_imported():
    code = "import sys; import " + ", ".join(f"soflow_edu.{name}" for name in PLANE) + "; print([m for m in ('sklearn', 'torchdiffeq', 'scipy', 'matplotlib', 'ipywidgets', 'anywidget', 'nbdev', 'fastcore') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_every_name_of_the_catalogue_exists():
    for kind, names in CATALOGUE.items():
        for name in names:
            assert find(kind, name) is not None
    for kind in ("path", "times", "coefficients", "schedule", "objective"):
        for name in CATALOGUE[kind]:
            if any(parameter.default is parameter.empty for parameter in signature(find(kind, name)).parameters.values()):
                continue   # it needs something that only an experiment can give
            made = build(kind, name)
            assert describe(build(kind, describe(made))) == describe(made)


def test_wheel_works_outside_the_repository(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)], cwd=ROOT, check=True)
    wheel, = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "soflow_edu/configs/plane.yaml" in names and {f"soflow_edu/{name}.py" for name in PLANE} <= set(names)
    frames = [part for part in zipfile.ZipFile(wheel).infolist() if part.filename.startswith("soflow_edu/frames/")]
    assert {"eight_gaussians.safetensors", "SHA256SUMS"} <= {Path(part.filename).name for part in frames} and sum(part.file_size for part in frames) < 1_000_000
    assert not [name for name in names if name.startswith(("tests", "nbs", "data"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = subprocess.run([sys.executable, "-c", "import soflow_edu; print(soflow_edu.__file__)"], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert str(tmp_path) in where
    subprocess.run([sys.executable, "-m", "soflow_edu", "demo", "--seconds", "2"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "runs/demo/figure.png").stat().st_size > 50_000
