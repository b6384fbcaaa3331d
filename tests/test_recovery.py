"""Runs whose process is gone without a word are ended by the next start; those that are going are left alone."""

import json
from pathlib import Path

import pytest
from conftest import composed
from filelock import FileLock

from gaplab import config as configs
from gaplab.recovery import recover
from gaplab.tracking import journal
from gaplab.tracking.journal import Tracker, read_journal


def begun(folder: Path, **more) -> Path:
    """A run that is under way."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.to_yaml(composed("tracking=none")))
    tracker = Tracker(folder, None, "a", {})
    tracker.metrics({"gap/acc": 0.1}, 1)
    tracker._file.close()
    return folder


def last(folder: Path) -> dict:
    return list(read_journal(folder))[-1]


def test_a_run_and_a_sweep_whose_process_is_gone_are_killed(tmp_path: Path):
    run, sweep = begun(tmp_path / "runs" / "a"), begun(tmp_path / "sweeps" / "b")
    (sweep / "sweep.json").write_text("{}")
    job = begun(sweep / "0_x")
    assert recover(tmp_path) == [run, job, sweep]
    assert [last(folder).get("status") for folder in (run, job, sweep)] == ["KILLED"] * 3
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["error"]) == ("KILLED", "its process ended without a word")
    assert result["config_hash"] == configs.config_hash(composed("tracking=none"))
    assert (job / "result.json").exists()
    assert not (sweep / "result.json").exists()
    assert recover(tmp_path) == []


def test_what_is_going_here_or_perhaps_elsewhere_is_left_alone(tmp_path: Path, monkeypatch):
    here = begun(tmp_path / "runs" / "here")
    monkeypatch.setattr(journal.platform, "node", lambda: "elsewhere")
    elsewhere = begun(tmp_path / "runs" / "there")
    monkeypatch.undo()
    with FileLock(here / ".lock"):
        assert recover(tmp_path) == []
    assert last(here)["event"] == last(elsewhere)["event"] == "metrics"
    assert recover(tmp_path) == [here]


@pytest.mark.parametrize("end", ["", '{"time": 1, "event": "fin'])
def test_a_last_line_that_was_cut_off_is_no_end(tmp_path: Path, end: str):
    run = begun(tmp_path / "runs" / "a")
    tracker = Tracker(run, None, "a", {})
    tracker.finish("FINISHED")
    assert journal.has_ended(run)
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "run", "name": "a"}\n' + end)
    assert not journal.has_ended(run)
    assert recover(tmp_path) == [run]
