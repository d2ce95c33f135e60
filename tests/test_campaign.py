"Short forms of the campaign, of which tests/campaign.py has the long ones."

from pathlib import Path

import pytest

import campaign
from helpers import python
from readers import READERS

TESTS = Path(__file__).parent


def short(*words) -> str:
    "What a part of the campaign says, or a case, that finds no fault."
    done = python(TESTS / "campaign.py", *words, "--short", timeout=1200)
    assert done.status == 0, done.said
    return done.out


def test_killed_before_a_file_operation_a_run_goes_on_to_the_bit():
    "A process is killed, then the same command is given again, as a queue does."
    short("kills", "plane, file operations")


def test_on_a_full_disk_nothing_is_lost():
    short("disks", "plane, full disk")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kills", "disks", "together", "memory"])
def test_faults_lose_nothing(part):
    said = short(part)
    assert all(case in said for case in campaign.PARTS[part][1])


FEW = (40, pytest.param(300, marks=pytest.mark.slow))


@pytest.mark.parametrize("count", FEW)
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_damaged_files_are_read_or_refused(reader, count, tmp_path):
    count = max(5, round(count * reader.share))
    row = campaign.Row("damage", reader.name)
    campaign.damage_some(row, reader, tmp_path, count, seed=count)
    assert not row.faults
    assert row.well + row.refused == row.tried == count


def test_the_campaign_sees_what_is_lost(tmp_path):
    "An error that is none of ours, a run that is not whole, and what hangs."

    def stumble(path):
        if b"1" not in path.read_bytes():
            raise ZeroDivisionError

    def write(folder):
        (folder / "a").write_bytes(b"111")
        return folder / "a"

    row = campaign.Row("damage", "stumbling")
    campaign.damage_some(row, campaign.Reader("a", write, stumble), tmp_path, 200, 0)
    assert row.raw and row.raw + row.well == 200
    assert "ZeroDivisionError" in row.faults[0]
    row = campaign.Row("kills", "not whole")
    (tmp_path / "run").mkdir()
    campaign.go_on(row, "here", lambda _: None, tmp_path / "run", tmp_path)
    assert row.lost == 1
    row = campaign.Row("kills", "hung")
    assert not row.judge("here", campaign.in_child(lambda: sum(iter(int, 1)), 2**30, 1))
    assert row.hung == 1


def test_the_report_is_that_of_its_rows():
    rows = [
        campaign.Row(**row) for row in campaign.json.loads(campaign.ROWS.read_text())
    ]
    assert campaign.REPORT.read_text(encoding="utf-8") == campaign.report(rows)
    cases = {(row.part, row.case) for row in rows}
    assert cases == set(campaign.all_cases())
    assert not any(row.faults for row in rows)
    assert sum(row.tried for row in rows if row.part == "damage") >= 100_000
