"Counts skipped tests, and fails the run if one is skipped for a reason that tests/allowed_skips.txt does not list."
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALLOWED = {line.strip() for line in (HERE / "allowed_skips.txt").read_text().splitlines() if line.strip() and not line.startswith("#")}
reasons = []


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reasons.append(report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr))


def pytest_collectreport(report):
    if report.skipped:
        reasons.append(report.longrepr[2].removeprefix("Skipped: "))


def pytest_sessionfinish(session):
    if set(reasons) - ALLOWED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(reasons)} skipped" + "".join(f"\n  {reason}{'' if reason in ALLOWED else '  <- not in tests/allowed_skips.txt: this fails the run'}" for reason in sorted(set(reasons))))


LONG = ("test_course", "test_dit", "test_cli", "test_scale", "test_site", "test_play", "test_browser", "test_plane")      # modules with tests of half a minute and more


def pytest_collection_modifyitems(items):
    "The longest first, in each half of the list: two workers start with one half each, and none is to begin a long test when the other has nothing left."
    def seconds(item):
        path = item.callspec.params.get("path") if item.name.startswith("test_runs[") else None
        return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("soflow_edu", {}).get("seconds", 0) if path else 30 if item.module.__name__ in LONG and "course" not in item.fixturenames else 0
    long, short = sorted(filter(seconds, items), key=seconds, reverse=True), [item for item in items if not seconds(item)]      # short ones, and those for which one worker builds the course while the other would wait, share fixtures with their neighbours
    half = len(short) // 2
    items[:] = [*long[::2], *short[:half], *long[1::2], *short[half:]]


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
