"What several test files share: places, programs, CPU seconds, small trainings."

import contextlib
import io
import os
import random
import resource
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from soflow_edu.config import Config
from soflow_edu.core import InputError, refusal, register
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


# --------------------------------------------------------------------- damaged files
def place_in(content: bytes, generator: random.Random) -> int:
    "A place of a file; half the time near its beginning or its end, where heads lie."
    last = max(len(content) - 1, 0)
    near = min(generator.randint(0, 511), last)
    anywhere = generator.randint(0, last)
    return generator.choice([near, last - near, anywhere, anywhere])


def with_flips(content: bytes, generator: random.Random) -> bytes:
    "One to eight bits turned."
    changed = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        if changed:
            changed[place_in(content, generator)] ^= 1 << generator.randint(0, 7)
    return bytes(changed)


def truncated(content: bytes, generator: random.Random) -> bytes:
    return content[: place_in(content, generator)]


NUMBERS = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def with_number(content: bytes, generator: random.Random) -> bytes:
    "A number of one to eight bytes, as sizes and addresses are, replaced."
    size = generator.choice([1, 2, 4, 8])
    number = generator.choice(NUMBERS) % 256**size
    order = generator.choice(["little", "big"])
    start = place_in(content, generator)
    end = start + size
    return content[:start] + number.to_bytes(size, order) + content[end:]


def with_noise(content: bytes, generator: random.Random) -> bytes:
    "Up to 64 bytes replaced by others, which may be fewer or more."
    start = place_in(content, generator)
    end = start + generator.randint(0, 64)
    return (
        content[:start] + generator.randbytes(generator.randint(0, 64)) + content[end:]
    )


def with_digits(content: bytes, generator: random.Random) -> bytes:
    "A digit of a text, such as that of a shape, made many."
    digits = [k for k, byte in enumerate(content[:4096]) if 48 <= byte <= 57]
    if not digits:
        return with_noise(content, generator)
    k = generator.choice(digits)
    end = k + 1
    more = b"9" * generator.choice([1, 3, 9, 30])
    kept = generator.choice([0, len(more)])  # in place of as many bytes, or between
    return content[:k] + more + content[end + kept :]


def with_another_head(content: bytes, generator: random.Random) -> bytes:
    "The first bytes of another kind of file."
    heads = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"PK\x03\x04", b"\x80\x02")
    heads += (
        b"\x89HDF\r\n\x1a\n",
        b"\x93NUMPY\x01\x00",
        b"GIF89a",
        b"II*\x00",
        b"<html>",
    )
    head = generator.choice(heads)
    return head + content[len(head) :]


DAMAGES = (
    with_flips,
    truncated,
    with_number,
    with_noise,
    with_digits,
    with_another_head,
)


def damage(content: bytes, generator: random.Random) -> bytes:
    "The content of a file after one of the accidents that happen to files."
    return generator.choice(DAMAGES)(content, generator)


def damaged_often(
    read: Callable[[Path], object],  # the reader of a file
    path: Path,  # a sound file, which is damaged here
    times: int,
    seed: int = 0,
) -> dict[str, int]:  # how many were "read" and how many "refused"
    "Lets a reader read damaged files. Raises what it raises unless it is InputError."
    content = path.read_bytes()
    counts = {"read": 0, "refused": 0}
    for k in range(times):
        path.write_bytes(damage(content, random.Random(f"{seed} {k}")))
        try:
            read(path)
            counts["read"] += 1
        except InputError:
            counts["refused"] += 1
        except BaseException as error:
            error.add_note(f"file {k} of seed {seed}")
            raise
    path.write_bytes(content)
    return counts


def within(
    action: Callable[[], object],
    room: int = 2**30,  # bytes of memory that it may take
) -> str:  # what it raised, with its traceback; empty if all was well
    "Runs an action in a child of this process whose memory is bounded."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            bound = pages * resource.getpagesize() + room
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
            warnings.simplefilter("ignore")
            action()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode(errors="replace"))
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        said = file.read()
    status = os.waitpid(child, 0)[1]
    return said or (f"ended with {status}" if status else "")


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
