"Counts skipped tests, and fails the run if one is skipped for a reason that tests/allowed_skips.txt does not list."
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


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
