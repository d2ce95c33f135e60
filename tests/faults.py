"""Faults put in on purpose: processes that die, full disks, damaged files.

What is tried runs in a child of this process, with limits. So it can neither stop the
tests nor take their memory. Such a child must not train what its parent has trained:
the threads of torch do not live on in it."""

import json
import math
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch

from soflow_edu import training
from soflow_edu.config import RUN_FILES
from soflow_edu.core import InputError
from soflow_edu.training import read_tensors


# ---------------------------------------------------------------------------- children
@dataclass
class Ended:
    "How a child of this process ended."

    how: str  # "done", "refused" (InputError), "raw" (another error), "died", "overdue"
    said: str = ""  # the message, the traceback, or the status
    value: Any = None  # what was returned, by way of JSON
    memory: int = 0  # bytes at most


def told(action: Callable[[], Any]) -> dict[str, Any]:
    "What came of an action, in words."
    try:
        return {"how": "done", "value": action()}
    except InputError as error:
        return {"how": "refused", "said": str(error)}
    except BaseException:
        return {"how": "raw", "said": traceback.format_exc()[-4000:]}


def live(action: Callable[[], Any], room: float, writer: int) -> NoReturn:
    "The whole life of a child."
    try:
        if room < math.inf:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            bound = pages * resource.getpagesize() + int(room)
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        warnings.simplefilter("ignore")
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        with open(writer, "w", encoding="utf-8", errors="replace") as file:
            json.dump(told(action), file)
    finally:
        os._exit(0)


def heard(reader: int, seconds: float) -> str | None:
    "All that is written into a pipe; None if its end does not come in time."
    until = time.monotonic() + seconds
    said = b""
    while (left := until - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            break
        piece = os.read(reader, 2**16)
        if not piece:
            return said.decode("utf-8", "replace")
        said += piece
    return None


def in_child(
    action: Callable[[], Any],
    room: float = 2**30,  # bytes of memory that it may take
    seconds: float = 300,  # after which it is killed
) -> Ended:
    "Runs an action in a child of this process, with limits."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        live(action, room, writer)
    os.close(writer)
    said = heard(reader, seconds)
    os.close(reader)
    if said is None:
        os.kill(child, signal.SIGKILL)
    status, usage = os.wait4(child, 0)[1:]
    memory = 1024 * usage.ru_maxrss
    if said is None:
        return Ended("overdue", f"longer than {seconds:g} s", memory=memory)
    if not said:
        code = os.waitstatus_to_exitcode(status)
        return Ended("died", f"status {code}", memory=memory)
    return Ended(**json.loads(said), memory=memory)


def within(
    action: Callable[[], Any],
    room: float = 2**30,  # bytes of memory that it may take
) -> str:  # what went wrong; empty if all was well
    "Runs an action in a child, whose value does not matter."
    ended = in_child(lambda: bool(action()), room)
    return "" if ended.how == "done" else f"{ended.how}: {ended.said}"


# --------------------------------------------------------------------- file operations
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")


@dataclass
class Operations:
    "The file operations of this process in a folder, counted as they come."

    folder: Path
    before: Callable[[int, str, tuple], None]  # number, event, what is operated on
    count: int = 0
    saves: list[int] | None = None  # the number at which each save began

    def note(self, event: str, given: tuple):
        if event in EVENTS and str(given[0]).startswith(str(self.folder)):
            self.tell(event, given)

    def tell(self, event: str, given: tuple = ()):
        self.count += 1
        self.before(self.count, event, given)

    def begin_save(self):
        assert self.saves is not None
        self.saves.append(self.count + 1)

    def watch(self):
        "From here on, in this process, which had better be a child."
        self.saves = []
        sys.addaudithook(self.note)
        # These leave no audit event of their own.
        announce(os, "fsync", lambda: self.tell("os.fsync"))
        announce(safetensors.torch, "save_file", lambda: self.tell("write"))
        announce(training, "write_run", self.begin_save)

    def of_saves(self) -> list[int]:
        "The numbers of the first, the middle and the last save, and of what is around."
        assert self.saves is not None
        starts = [1, *self.saves[1:], self.count + 1]
        chosen: set[int] = set()
        for k in (0, len(self.saves) // 2, len(self.saves) - 1):
            chosen |= set(range(starts[k], starts[k + 1]))
        return sorted(chosen)


def announce(module, name: str, before: Callable[[], None]):
    "Has a function called before each call of one in a module."
    real = getattr(module, name)

    def announced(*given, **options):
        before()
        return real(*given, **options)

    setattr(module, name, announced)


def writes(event: str, given: tuple) -> bool:
    "Whether an operation needs room on the disk."
    if event == "open":
        return bool(given[2] & os.O_CREAT)
    return event in ("os.mkdir", "os.fsync", "write")


def changes(event: str, given: tuple) -> bool:
    "Whether an operation changes anything on the disk."
    if event == "open":
        return bool(given[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
    return True


def die(event: str, given: tuple):
    os._exit(9)


def full_disk(event: str, given: tuple):
    if writes(event, given):
        raise OSError(28, "No space left on device")


def read_only_disk(event: str, given: tuple):
    if changes(event, given):
        raise OSError(30, "Read-only file system")


FAULTS = {"killed": die, "full disk": full_disk, "read-only disk": read_only_disk}


def watched(
    action: Callable[[], Any],
    folder: Path,
    fault: str = "killed",  # one of FAULTS
    first: float = math.inf,  # the operation from which on it is there
) -> dict[str, Any]:  # "count" of operations, and those "of_saves"
    "Runs an action that meets a fault, in this process, which had better be a child."

    def before(number: int, event: str, given: tuple):
        if number >= first:
            FAULTS[fault](event, given)

    operations = Operations(folder, before)
    operations.watch()
    action()
    return {"count": operations.count, "of_saves": operations.of_saves()}


# -------------------------------------------------------------------------- whole runs
def without_seconds(log: list[dict]) -> list[dict]:
    return [row | {"seconds": 0} for row in log]


def check_whole(folder: Path, reference: Path):
    "Raises AssertionError unless a folder holds a run to the bit, and nothing else."
    held = {path.name for path in folder.iterdir()}
    assert held == set(RUN_FILES), f"it holds {sorted(held)}"
    for name in ("model.safetensors", "checkpoint.safetensors"):
        there, described_there = read_tensors(reference / name)
        here, described_here = read_tensors(folder / name)
        assert here.keys() == there.keys(), f"{name} has other tensors"
        wrong = [key for key in there if not here[key].equal(there[key])]
        assert not wrong, f"{name} has another {wrong[0]}"
        logs = [described["log"] for described in (described_here, described_there)]
        assert without_seconds(logs[0]) == without_seconds(logs[1]), f"{name}: log"
    lines = {}
    for name in ("config.yaml", "run.json", "log.csv"):
        lines[name] = (folder / name).read_text().count("\n")
        there = (reference / name).read_text().count("\n")
        assert lines[name] == there, f"{name} has {lines[name]} lines, not {there}"
    assert lines["log.csv"] == 1 + len(logs[0]), "log.csv lacks rows"


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
    more = b"9" * generator.choice([1, 3, 9, 30, 400, 5000])
    kept = generator.choice([0, len(more)])  # in place of as many bytes, or between
    return content[:k] + more + content[end + kept :]


def with_a_stretch(content: bytes, generator: random.Random) -> bytes:
    "One byte many times, as a disk leaves it, in place of others or between them."
    start = place_in(content, generator)
    byte = generator.choice([b"\0", b"\xff", b"[", b"9", content[start : start + 1]])
    size = generator.choice([16, 512, 4096, 2**17])
    kept = generator.choice([0, size])
    end = start + size - kept
    return content[:start] + byte * size + content[end:]


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
    with_a_stretch,
    with_another_head,
)


def damage(content: bytes, generator: random.Random) -> bytes:
    "The content of a file after one of the accidents that happen to files."
    return generator.choice(DAMAGES)(content, generator)


class TooSlow(BaseException):
    "A reader takes too long for a file."


def ring(number: int, frame: Any):
    raise TooSlow


@dataclass
class Damages:
    "What a reader made of damaged files."

    read: int = 0
    refused: int = 0
    raw: int = 0
    slow: int = 0
    faults: list[str] = field(default_factory=list)  # of those that are none of ours


def damaged_often(
    read: Callable[[Path], object],  # the reader of a file
    path: Path,  # a sound file, which is damaged here
    times: int,
    seed: int = 0,
    seconds: int = 20,  # that one file may take
) -> dict[str, Any]:  # the fields of Damages
    "Lets a reader read damaged files, and counts what comes of it."
    content = path.read_bytes()
    found = Damages()
    signal.signal(signal.SIGALRM, ring)
    for k in range(times):
        path.write_bytes(damage(content, random.Random(f"{seed} {k}")))
        signal.alarm(seconds)
        try:
            read(path)
            found.read += 1
        except InputError:
            found.refused += 1
        except TooSlow:
            found.slow += 1
            found.faults.append(f"file {k} of seed {seed}: longer than {seconds} s")
        except BaseException as error:
            found.raw += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"
            found.faults.append(f"file {k} of seed {seed}: {words}"[:300])
        finally:
            signal.alarm(0)
    path.write_bytes(content)
    return asdict(found)
