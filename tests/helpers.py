"What several test files share: places, the command line, CPU seconds."

import contextlib
import io
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests" / "parity"
sys.path.insert(0, str(ROOT / "nbs"))  # for book and house


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
