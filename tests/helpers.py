"What several test files share: places, programs, CPU seconds, small trainings."

import contextlib
import io
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from soflow_edu.config import Config
from soflow_edu.core import refusal, register
from soflow_edu.training import Step, assemble, finish, train

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests" / "parity"


@dataclass
class Done:
    "What a program said, and how it ended."

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def soflow(*words, folder: Path | str = ".") -> Done:
    "`soflow WORD ...`, called in this process, in a folder."
    from soflow_edu.cli import main

    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Done(status, out.getvalue(), err.getvalue())


def program(*words, folder: Path | str = ".", timeout=600, **environment) -> Done:
    "A console script of this environment, in a process of its own."
    name, *rest = [str(word) for word in words]
    done = subprocess.run(
        [Path(sys.executable).with_name(name), *rest],
        cwd=folder,
        env=os.environ | environment,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def python(*words, folder: Path | str = ".", timeout=600, **environment) -> Done:
    "The Python of this environment, in a process of its own."
    name = Path(sys.executable).name
    return program(name, *words, folder=folder, timeout=timeout, **environment)


def cpu_seconds(*words) -> float:
    "CPU seconds that Python takes in a process of its own; it must end well."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(*words)
    assert done.status == 0, done.said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def complaint(action, *given, **options) -> str:
    "The message with which an action refuses what it is given, in one line."
    return " ".join(refusal(action, *given, **options).split())


# ------------------------------------------------------------------------ trainings
class SamplesOnly:
    "Hides everything of a law but its samples."

    def __init__(self, law):
        self.sample = law.sample


def train_to_end(config: Config, data, **options) -> Step:
    "The last step of a training as a configuration says."
    model, objective = assemble(config)
    return finish(train(model, objective, data, config, **options))


@register("network", "picture")
class PictureNetwork(nn.Module):
    "A small network for pictures with labels, of which the library knows nothing."

    def __init__(self, channels: int = 3, width: int = 16, classes: int = 4):
        super().__init__()
        self.options = {"channels": channels, "width": width, "classes": classes}
        self.classes = classes
        self.inlet = nn.Conv2d(channels, width, 3, padding=1)
        self.outlet = nn.Conv2d(width, channels, 3, padding=1)
        self.times = nn.Linear(2, width)
        self.labels = nn.Embedding(classes + 1, width)

    def spec(self):
        return {"name": "picture"} | self.options

    def forward(self, x, t, d, y=None):
        if y is None:
            y = torch.full_like(t, self.classes, dtype=torch.long)
        shift = self.times(torch.stack([t, d], 1)) + self.labels(y)
        h = self.inlet(x) + shift[:, :, None, None]
        return self.outlet(nn.functional.silu(h))


GUIDED = {
    "name": "soflow",
    "lam": 0.5,
    "target": {"name": "guided", "w": 2.0, "m": 0.5},
}
