"""The campaign: faults put in on purpose, many of each kind, and what became of each.

    python tests/campaign.py                   all parts, and the report in campaign.md
    python tests/campaign.py PART [CASE ...]   some, whose rows are replaced there
    ... --short                                few of each, without a report
    python tests/campaign.py PART CASE --here  one case in this process; prints its row

A row counts what was tried: what went well, what was refused in words, and four that
must be zero: what was lost, raw tracebacks, hangs, and memory above 2 GB."""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # each child would import it  # noqa: F401

import hostile
from faults import Ended, check_whole, damaged_often, in_child, watched
from readers import READERS, Reader, foreign
from soflow_edu import grading, ladder
from soflow_edu.config import load_config, shipped_configs
from soflow_edu.training import load_run

HERE = Path(__file__).parent
REPORT = HERE / "campaign.md"
ROWS = HERE / "campaign.json"
MOST_MEMORY = 2 * 10**9
LONG = 300  # seconds after which something hangs


@dataclass
class Row:
    "What became of the faults of one case."

    part: str
    case: str
    tried: int = 0
    well: int = 0
    refused: int = 0
    lost: int = 0
    raw: int = 0
    hung: int = 0
    memory: int = 0  # bytes at most, of one process
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def blame(self, kind: str, where: str, words: str):
        setattr(self, kind, getattr(self, kind) + 1)
        self.faults.append(f"{where}: {kind}: {words}"[-600:])

    def counts(self) -> list[int]:
        return [getattr(self, name) for name in COLUMNS]

    def judge(self, where: str, ended: Ended) -> bool:
        "Whether a child ended as it may: at its end, with words, or killed by us."
        self.memory = max(self.memory, ended.memory)
        if ended.how == "raw":
            self.blame("raw", where, ended.said)
        if ended.how == "overdue":
            self.blame("hung", where, ended.said)
        if ended.how == "died" and ended.said != "status 9":
            self.blame("lost", where, ended.said)
        return ended.how in ("done", "refused") or ended.said == "status 9"


COLUMNS = ("tried", "well", "refused", "lost", "raw", "hung")


@dataclass(frozen=True)
class Size:
    "How many of each."

    moments: int  # at which a run is killed
    stride: int  # of the file operations
    files: int  # that are damaged, over all readers
    together: int  # jobs of two processes
    steps: int  # over which memory is watched
    attacks: int  # every so many


FULL = Size(20, 1, 100_000, 10, 20_000, 1)
SHORT = Size(1, 37, 6_000, 1, 800, 9)


# -------------------------------------------------------------------------------- runs
SMALL = ("steps=10", "checkpoint_every=2", "log_every=1", "batch=4", "threads=1")
SMALL += ("device=cpu", "compile=false")
UNET = ("network.width=8", "network.multipliers=[1]", "network.blocks=1")
UNET += ("network.attention=[]", "data.count=500")
DIT = (
    "network={name: dit, size: 4, patch: 2, width: 8, depth: 1, heads: 2, classes: 12}"
)


def changes_of(name: str, latents: Path) -> tuple[str, ...]:
    "What makes a rung small."
    if name.startswith("imagenet"):
        return (*SMALL, DIT, f"data={{name: latents, path: {latents}}}")
    return (*SMALL, *(UNET if name.startswith("cifar10") else ("network.width=8",)))


def trainer(name: str, folder: Path) -> Callable[[Path], None]:
    "What trains a small form of a rung in a folder, and goes on with a run there."
    latents = folder / "latents.hdf5"
    foreign(latents, np.ones((12, 8, 4, 4), np.float32), {"channels": 4})
    config = ladder.changed(load_config(name), changes_of(name, latents))
    data = ladder.made_ready(ladder.data_of(config))

    def read(_: Any):
        return data

    def run(place: Path):
        ladder.data_of = read  # once for all children
        ladder.train_run(config, place, resume=True)

    return run


def go_on(row: Row, where: str, train: Callable, place: Path, reference: Path):
    "Gives the command again, and looks whether the run is that without a fault."
    ended = in_child(lambda: train(place), seconds=LONG)
    if not row.judge(where, ended):
        return
    try:
        assert ended.how == "done", ended.said
        check_whole(place, reference)
        row.well += 1
    except AssertionError as error:
        row.blame("lost", where, str(error))
    shutil.rmtree(place, ignore_errors=True)


def operations_of(train: Callable, reference: Path) -> list[int]:
    "The file operations of the first, the middle and the last save of a run."
    ended = in_child(lambda: watched(lambda: train(reference), reference))
    assert ended.how == "done", ended.said
    return ended.value["of_saves"]


def with_fault_at(row: Row, fault: str, size: Size, folder: Path):
    "A fault from each file operation on, and the same command again without it."
    train = trainer(row.case.split(",")[0], folder)
    reference = folder / "reference"
    for number in operations_of(train, reference)[:: size.stride]:
        place = folder / f"{number}"

        def faulty(place=place, number=number):
            watched(lambda: train(place), place, fault, number)

        row.tried += 1
        ended = in_child(faulty, seconds=LONG)
        where = f"{fault} at operation {number}"
        if fault == "killed" and ended.how != "died":
            row.blame("lost", where, f"it was not killed, but {ended.how}")
        elif row.judge(where, ended):
            row.refused += ended.how == "refused"
            go_on(row, where, train, place, reference)


def killed_at_moments(row: Row, size: Size, folder: Path):
    train = trainer(row.case.split(",")[0], folder)
    reference = folder / "reference"
    begun = time.monotonic()
    ended = in_child(lambda: train(reference))
    assert ended.how == "done", ended.said
    length = time.monotonic() - begun
    generator = random.Random(row.case)
    for k in range(size.moments):
        place = folder / f"{k}"
        moment = generator.uniform(0, length)
        row.tried += 1
        ended = in_child(lambda p=place: train(p), seconds=moment)
        if ended.how == "overdue" or row.judge(f"moment {k}", ended):
            go_on(row, f"killed after {moment:.3f} s", train, place, reference)


def with_short_files(row: Row, size: Size, folder: Path):
    "Files may not grow beyond a limit: the write that reaches it fails half way."
    train = trainer(row.case.split(",")[0], folder)
    reference = folder / "reference"
    assert in_child(lambda: train(reference)).how == "done"
    largest = max(path.stat().st_size for path in reference.iterdir())

    def limited(place: Path, limit: int):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train(place)

    for k in range(size.moments):
        limit = largest * k // size.moments
        place = folder / f"{k}"
        row.tried += 1
        ended = in_child(lambda p=place, most=limit: limited(p, most), seconds=LONG)
        where = f"files of {limit:,} bytes at most"
        if row.judge(where, ended):
            row.refused += ended.how == "refused"
            go_on(row, where, train, place, reference)


def kills(row: Row, size: Size, folder: Path):
    if row.case.endswith("file operations"):
        with_fault_at(row, "killed", size, folder)
    else:
        killed_at_moments(row, size, folder)


def disks(row: Row, size: Size, folder: Path):
    if row.case.endswith("short files"):
        with_short_files(row, size, folder)
    else:
        with_fault_at(row, row.case.split(", ")[1], size, folder)


# --------------------------------------------------------------------------- processes
WORDS = ("plane", "network.width=8", "batch=32", "log_every=1", "threads=1")


def started(words: tuple, place: Path, log: Path, **options) -> subprocess.Popen:
    "A training as a program, whose words go into a file."
    program = [sys.executable, *words, "--out", str(place)]
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(program, stdout=file, stderr=file, **options)


def workers_of(job: subprocess.Popen) -> list[int]:
    "The numbers of the processes that a launcher has started, by rank."
    task = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    found = []
    for number in task.read_text().split():
        environment = Path(f"/proc/{number}/environ").read_bytes()
        rank = re.search(rb"\0RANK=(\d)", environment)
        if rank:
            found.append((int(rank[1]), int(number)))
    return [number for _, number in sorted(found)]


class Pair:
    "A job of two processes that share each batch, with a file of words for each."

    def __init__(self, folder: Path, name: str):
        self.place = folder / name
        self.logs = folder / f"{name}-logs"
        launch = ("-m", "torch.distributed.run", "--standalone")
        launch += ("--nproc-per-node", "2", "--redirects", "3")
        launch += ("--log-dir", str(self.logs), "-m", "soflow_edu", "train", *WORDS)
        words = (*launch, "steps=400", "checkpoint_every=20", "--resume")
        self.begun = time.monotonic()
        self.job = started(words, self.place, folder / f"{name}.txt")

    def wait(self) -> float | None:  # seconds; None if it hangs
        try:
            self.job.wait(LONG)
        except subprocess.TimeoutExpired:
            self.job.kill()
            return None
        return time.monotonic() - self.begun

    def kill_one(self, rank: int, moment: float):
        "Ends the worker of a rank by force, a while after the beginning."
        while time.monotonic() - self.begun < moment or not workers_of(self.job):
            if self.job.poll() is not None:
                return
            time.sleep(0.02)
        workers = workers_of(self.job)
        os.kill(workers[min(rank, len(workers) - 1)], signal.SIGKILL)

    def said(self) -> str:
        "What the workers wrote."
        files = sorted(self.logs.rglob("std*.log"))
        return "\n".join(path.read_text(errors="replace") for path in files)


def one_of_two_killed(row: Row, size: Size, folder: Path):
    reference = Pair(folder, "reference")
    length = reference.wait()
    assert length and reference.job.returncode == 0, reference.said()
    generator = random.Random(7)
    for k in range(size.together):
        moment = generator.uniform(0.2, 1.0) * length
        row.tried += 1
        where = f"rank {k % 2} killed after {moment:.2f} of {length:.2f} s"
        first = Pair(folder, f"{k}")
        first.kill_one(k % 2, moment)
        if first.wait() is None:
            row.blame("hung", where, first.said())
            continue
        if "Traceback" in first.said():
            row.blame("raw", where, first.said())
        second = Pair(folder, f"{k}")
        if second.wait() is None:
            row.blame("hung", f"{where}, again", second.said())
            continue
        try:
            assert second.job.returncode == 0, second.said()
            check_whole(second.place, reference.place)
            row.well += 1
        except AssertionError as error:
            row.blame("lost", where, str(error))


def two_in_one_folder(row: Row, size: Size, folder: Path):
    "Two programs at the same moment: one trains, the other says who does."
    words = ("-m", "soflow_edu", "train", *WORDS, "steps=2000", "checkpoint_every=100")
    reference = started(words, folder / "reference", folder / "reference.txt")
    assert reference.wait(LONG) == 0
    for k in range(size.together):
        place = folder / f"{k}"
        logs = [folder / f"{k}-{which}.txt" for which in "ab"]
        row.tried += 1
        jobs = [started(words, place, log) for log in logs]
        try:
            status = sorted(job.wait(LONG) for job in jobs)
        except subprocess.TimeoutExpired:
            row.blame("hung", f"{k}", "")
            continue
        said = "\n".join(log.read_text() for log in logs)
        if "Traceback" in said:
            row.blame("raw", f"{k}", said)
        try:
            assert status == [0, 2], (status, said)
            assert "is being written by process" in " ".join(said.split()), said
            check_whole(place, folder / "reference")
            row.refused += 1
            row.well += 1
        except AssertionError as error:
            row.blame("lost", f"{k}", str(error))


def together(row: Row, size: Size, folder: Path):
    if row.case == "one of two processes killed":
        one_of_two_killed(row, size, folder)
    else:
        two_in_one_folder(row, size, folder)


# ------------------------------------------------------------------------------- files
SHARES = sum(reader.share for reader in READERS)
AT_ONCE = 500  # files that one child reads


def damage(row: Row, size: Size, folder: Path):
    reader = next(reader for reader in READERS if reader.name == row.case)
    left = round(size.files * reader.share / SHARES)
    seed = 0
    while left > 0:
        count = min(left, AT_ONCE)
        place = folder / f"{seed}"
        place.mkdir()
        damage_some(row, reader, place, count, seed)
        shutil.rmtree(place)
        left -= count
        seed += 1


def damage_some(row: Row, reader: Reader, place: Path, count: int, seed: int):
    "Has a child read damaged files."

    path = reader.write(place)

    def read() -> dict[str, Any]:
        reader.read(path)
        return damaged_often(reader.read, path, count, seed)

    ended = in_child(read, seconds=LONG)
    row.tried += count
    if not row.judge(f"seed {seed}", ended):
        return
    if ended.how == "refused":  # the sound file
        row.blame("lost", f"seed {seed}", ended.said)
        return
    found = ended.value
    row.well += found["read"]
    row.refused += found["refused"]
    row.raw += found["raw"]
    row.hung += found["slow"]
    row.faults += found["faults"]


# ------------------------------------------------------------------------------- marks
def marks(row: Row, size: Size, folder: Path):
    "Hostile answers; well is where each got what is due and nothing else."
    fence = row.case.rpartition(" ")[2]
    if fence == "Python":
        grading.can_wrap = bool
    elif not grading.can_wrap():
        row.faults.append("bubblewrap is not installed, or not allowed here")
        return
    for k, attack in enumerate(hostile.ATTACKS[:: size.attacks]):
        place = folder / f"{k}"
        place.mkdir()
        row.tried += 1
        try:
            found = hostile.SmallClass(place).stands(attack, fence.lower())
        except Exception as error:  # the grader's own
            row.blame("raw", attack.name, f"{type(error).__name__}: {error}")
            continue
        row.well += not found
        for words in found:
            row.blame("lost", attack.name, words)


# ------------------------------------------------------------------------------ memory
def resident() -> int:  # bytes
    "What this process holds now."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory(row: Row, size: Size, folder: Path):
    "Many steps, with a save at every hundredth: well is where nothing grows."
    name = row.case.split(",")[0]
    changes = changes_of(name, folder / "none")
    more = (f"steps={size.steps}", "checkpoint_every=100", "log_every=50")
    config = ladder.changed(load_config(name), (*changes, *more))

    def watch() -> list[int]:
        held = []
        model, objective = ladder.assemble(config)
        data = ladder.made_ready(ladder.data_of(config))
        steps = ladder.train(model, objective, data, config, out=folder / "run")
        for step in steps:
            if step.number % (size.steps // 10) == 0:
                held.append(resident())
        return held

    row.tried = size.steps
    ended = in_child(watch, seconds=20 * LONG)
    if not row.judge("steps", ended) or ended.how != "done":
        row.blame("lost", "steps", ended.said)
        return
    growth = ended.value[-1] - ended.value[1]
    assert load_run(folder / "run").step == size.steps
    if growth > 20e6 + 500 * size.steps:  # the log is kept, 50 steps a row
        row.blame("lost", "steps", f"memory grew by {growth:,} bytes")
    row.well = size.steps


# ------------------------------------------------------------------------ the campaign
RUNGS = sorted(shipped_configs())
ON_DISKS = ("plane", "cifar10-laptop", "imagenet-laptop")
FAULTS = ("full disk", "read-only disk", "short files")


def pairs(rungs: Iterable[str], kinds: Iterable[str]) -> list[str]:
    "A case for each rung and kind of fault."
    return [", ".join(pair) for pair in product(rungs, kinds)]


PARTS: dict[str, tuple[Callable[[Row, Size, Path], None], list[str]]] = {
    "kills": (
        kills,
        pairs(RUNGS, ("file operations", "moments")),
    ),
    "disks": (disks, pairs(ON_DISKS, FAULTS)),
    "together": (together, ["one of two processes killed", "two runs in one folder"]),
    "damage": (damage, [reader.name for reader in READERS]),
    "marks": (marks, ["fence of Python", "fence of bubblewrap"]),
    "memory": (memory, ["plane, steps", "digits, steps"]),
}


def carry_out(part: str, case: str, size: Size) -> Row:
    "One case of the campaign, in this process."
    row = Row(part, case)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        PARTS[part][0](row, size, Path(folder))
    row.seconds = round(time.monotonic() - begun, 1)
    if row.memory > MOST_MEMORY:
        row.faults.append(f"a process took {row.memory:,} bytes")
    return row


def elsewhere(part: str, case: str, short: bool) -> Row:
    "One case in a process of its own, which has trained nothing."
    words = [sys.executable, __file__, part, case, "--here"]
    words += ["--short"] if short else []
    done = subprocess.run(words, capture_output=True, text=True)
    try:
        row = Row(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        row = Row(part, case, faults=[f"it failed: {done.stderr[-2000:]}"])
    print(f"{part:9s} {case:40s} {row.tried:7,} {row.seconds:7.1f} s", flush=True)
    for words in row.faults[:3]:
        print(f"    {words}", flush=True)
    return row


def all_cases(part: str = "") -> list[tuple[str, str]]:
    "Pairs of part and case: those of a part, or all."
    found: list[tuple[str, str]] = []
    for name in [part] if part else PARTS:
        found += product([name], PARTS[name][1])
    return found


def campaign(cases: list[tuple[str, str]], short: bool) -> list[Row]:
    "Some cases, as many at a time as there are processors."
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: elsewhere(*pair, short), cases))


# ------------------------------------------------------------------------------ report
HEAD = """\
# The campaign

Faults put in on purpose, many of each kind. `make campaign` makes this page anew.

A row counts what was tried. *Well* is what ended as if there had been no fault: a run
that went on to the same numbers to the bit, a file that could be read, an answer that
got its due. *Refused* was said in words (a damaged file, a full disk), and nothing was
lost by it. *Lost*, *raw* (a traceback where words were due) and *hung* must be zero,
and no process may hold more than 2,000 MB.
"""
WORDS_OF = {
    "kills": "Every rung, small, killed before each file operation of its first, "
    "middle and last save, and at random moments; then the same command again.",
    "disks": "A disk that is full or read-only from a file operation on, and files "
    "that cannot grow; then the same command again, with room.",
    "together": "Two processes that train together, one of them killed; and two runs "
    "started in one folder at the same moment.",
    "damage": "Damaged files: bits turned, files cut, numbers replaced, noise, digits "
    "made many, one byte many times, the head of another kind of file.",
    "marks": "Hostile answers to an assignment, marked behind each of the two fences. "
    "Two of them call the system behind Python's back, which only the fence of "
    "bubblewrap can stop; behind the other they must leave nothing running.",
    "memory": "Steps of one run, with a save at every hundredth.",
}


def table_of(rows: list[Row]) -> list[str]:
    names = ["case", *COLUMNS, "MB at most", "s"]
    cells = [names, [":--", *len(names[1:]) * ["--:"]]]
    for row in rows:
        held = f"{row.memory / 1e6:,.0f}" if row.memory else ""
        numbers = [f"{number:,}" for number in row.counts()]
        cells.append([row.case, *numbers, held, f"{row.seconds:,.0f}"])
    totals = [sum(column) for column in zip(*map(Row.counts, rows), strict=True)]
    cells.append(["**all**", *(f"**{total:,}**" for total in totals), "", ""])
    return [f"| {' | '.join(line)} |" for line in cells]


def report(rows: list[Row]) -> str:
    lines = [HEAD]
    for part in PARTS:
        own = [row for row in rows if row.part == part]
        if not own:
            continue
        lines += [f"## {part.capitalize()}", "", WORDS_OF[part], "", *table_of(own), ""]
        for row in own:
            lines += [f"- {row.case}: {words}" for words in row.faults[:20]]
    return "\n".join(lines).rstrip() + "\n"


def kept_rows() -> list[Row]:
    "The rows of the report."
    return [Row(**row) for row in json.loads(ROWS.read_text())]


def keep(rows: list[Row]):
    "Puts new rows in place of those of the same cases, and writes the report."
    old = kept_rows() if ROWS.exists() else []
    found = {(row.part, row.case): row for row in old + rows}
    rows = [found[pair] for pair in all_cases() if pair in found]
    ROWS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    REPORT.write_text(report(rows), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--here", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.here:
        row = carry_out(given.part, *given.cases, SHORT if given.short else FULL)
        print(json.dumps(asdict(row)))
        return 0
    some = [(given.part, case) for case in given.cases]
    rows = campaign(some or all_cases(given.part or ""), given.short)
    if not given.short:
        keep(rows)
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
