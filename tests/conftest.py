"""Counts skipped tests, and fails the run if one is skipped for a reason that
tests/allowed_skips.txt does not list."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
reasons = []


def allowed() -> set[str]:
    lines = (HERE / "allowed_skips.txt").read_text(encoding="utf-8").splitlines()
    stripped = {line.strip() for line in lines if not line.startswith("#")}
    return stripped - {""}


def reason_of(report) -> str:
    place = report.longrepr
    words = place[2] if isinstance(place, tuple) else str(place)
    return words.removeprefix("Skipped: ")


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reasons.append(reason_of(report))


def pytest_collectreport(report):
    if report.skipped:
        reasons.append(reason_of(report))


def pytest_sessionfinish(session):
    if set(reasons) - allowed():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(reasons)} skipped")
    for reason in sorted(set(reasons)):
        note = "not in tests/allowed_skips.txt: this fails the run"
        mark = "" if reason in allowed() else f"  <- {note}"
        terminalreporter.write_line(f"  {reason}{mark}")


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
