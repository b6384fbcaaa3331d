"""Every command finds the same run by the same name, and the latest is the one that began last."""

import os
import time

import pytest

from gaplab.errors import UserError
from gaplab.finder import find_run, find_sweep
from gaplab.tracking.journal import append, write_receipt

RUN_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def outputs(tmp_path):
    """A run of the hour before summer time ended, one of the hour after, and two sweeps: names run against time."""
    stage(tmp_path / "runs" / "2026-10-25_02-50-00_before", 1000)
    stage(tmp_path / "runs" / "2026-10-25_02-10-00_after", 2200)
    for name, begun in ("2026-10-26_09-00-00_b", 3000), ("2026-10-26_03-00-00_moved_west", 4000):
        stage(tmp_path / "sweeps" / name, begun, "sweep.json")
        for number in range(2):
            stage(tmp_path / "sweeps" / name / f"{number}_seed={number}", begun + 1 + number)
    return tmp_path


def stage(folder, begun, marker="config.yaml"):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").touch()
    (folder / marker).write_text("{}")
    append(folder, "run", time=begun)
    append(folder, "finish", time=time.time(), status="FINISHED")


def test_the_latest_is_what_began_last_whatever_its_name(outputs, capsys):
    newest = outputs / "sweeps" / "2026-10-26_03-00-00_moved_west"
    assert find_sweep(outputs, "latest", "sweep") == newest
    assert find_run(outputs, "latest", "against", "checkpoints/best.ckpt") == newest / "1_seed=1"
    assert capsys.readouterr().err.splitlines() == [
        "sweep=latest is sweeps/2026-10-26_03-00-00_moved_west",
        "against=latest is sweeps/2026-10-26_03-00-00_moved_west/1_seed=1",
    ]


def test_resume_takes_the_latest_run_outside_sweeps_and_names_the_newer_job(outputs, capsys):
    found = find_run(outputs, "latest", "resume", resumable=True)
    assert found == outputs / "runs" / "2026-10-25_02-10-00_after"
    job = "sweeps/2026-10-26_03-00-00_moved_west/1_seed=1"
    told = capsys.readouterr().err
    assert f"{found.name}; {job} is newer, but a job of a sweep: " in told
    assert told.endswith(f"train.py -m sweep.resume={outputs / job.rpartition('/')[0]}\n")
    stage(outputs / "runs" / "newest", 5000)
    for _ in range(3):  # as resume=latest looks
        assert find_run(outputs, "latest", "resume", resumable=True).name == "newest"
    assert capsys.readouterr().err == "resume=latest is runs/newest\n"


def test_copying_does_not_make_a_run_newer_and_one_without_a_journal_has_the_time_of_its_files(outputs):
    os.utime(outputs / "runs" / "2026-10-25_02-50-00_before" / "config.yaml")
    assert find_run(outputs, "latest", "resume", resumable=True).name.endswith("after")
    old = outputs / "runs" / "2025-01-01_00-00-00_without_journal"
    stage(old, 0)
    (old / "journal.jsonl").unlink()
    os.utime(old / "config.yaml", (2100, 2100))
    assert find_run(outputs, "latest", "resume", resumable=True).name.endswith("after")
    os.utime(old / "config.yaml", (2300, 2300))
    assert find_run(outputs, "latest", "resume", resumable=True) == old


def test_only_a_run_with_the_file_that_is_needed_is_the_latest(outputs):
    (outputs / "sweeps" / "2026-10-26_03-00-00_moved_west" / "1_seed=1" / "checkpoints" / "best.ckpt").unlink()
    assert find_run(outputs, "latest", "run", "checkpoints/best.ckpt").name == "0_seed=0"


def test_a_job_is_found_by_its_name_its_sweep_and_its_id(outputs, capsys):
    job = outputs / "sweeps" / "2026-10-26_09-00-00_b" / "0_seed=0"
    write_receipt(job, {"run_id": RUN_ID})
    for name in (str(job), f"{job.parent.name}/{job.name}", RUN_ID):
        assert find_run(outputs, name, "run") == job
    assert capsys.readouterr().err == ""
    newest = outputs / "sweeps" / "2026-10-26_03-00-00_moved_west" / "0_seed=0"
    assert find_run(outputs, "0_seed=0", "run") == newest
    told = capsys.readouterr().err
    assert told == f"run=0_seed=0 is sweeps/{newest.parent.name}/0_seed=0, the newest of 2 jobs with this name\n"
    assert find_run(outputs, RUN_ID.replace("0", "1"), "run") is None


REFUSED = {
    "nowhere": "run=nowhere: no run there",
    "*": r"run=\*: no run there",
    "2026-10-26_09-00-00_b": "a sweep; name one of the jobs in it",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_run_is_named(outputs, name):
    with pytest.raises(UserError, match=REFUSED[name]):
        find_run(outputs, name, "run")


@pytest.mark.parametrize("name", ["2026-10-26_09-00-00_b", "1_seed=1", "2026-10-26_09-00-00_b/1_seed=1"])
def test_a_sweep_and_its_jobs_are_resumed_as_a_sweep(outputs, name):
    with pytest.raises(UserError, match=r"of a sweep; go on with .*train.py -m sweep.resume=.*/sweeps/2026-10-26_0"):
        find_run(outputs, name, "resume", resumable=True)


def test_nothing_is_no_latest(tmp_path):
    with pytest.raises(UserError, match=r"run=latest: no run in .* that has finished an epoch"):
        find_run(tmp_path, "latest", "run", "checkpoints/best.ckpt")
    with pytest.raises(UserError, match="no sweep in"):
        find_sweep(tmp_path, "latest", "sweep")
