"""Runs whose process is gone without a word are ended by the next start; those that are going are left alone."""

import json
import platform
from pathlib import Path

import pytest
from conftest import composed
from filelock import FileLock

from gaplab import config as configs
from gaplab.config import Tracking
from gaplab.recovery import recover
from gaplab.tracking import journal
from gaplab.tracking.journal import Tracker, read_journal

NONE = Tracking()


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
    assert recover(tmp_path, NONE) == [run, job, sweep]
    assert [last(folder).get("status") for folder in (run, job, sweep)] == ["KILLED"] * 3
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["error"]) == ("KILLED", "its process ended without a word")
    assert result["config_hash"] == configs.config_hash(composed("tracking=none"))
    assert (job / "result.json").exists()
    assert not (sweep / "result.json").exists()
    assert recover(tmp_path, NONE) == []


def test_what_is_going_here_or_perhaps_elsewhere_is_left_alone(tmp_path: Path, monkeypatch):
    here = begun(tmp_path / "runs" / "here")
    monkeypatch.setattr(journal.platform, "node", lambda: "elsewhere")
    elsewhere = begun(tmp_path / "runs" / "there")
    monkeypatch.undo()
    with FileLock(here / ".lock"):
        assert recover(tmp_path, NONE) == []
    assert last(here)["event"] == last(elsewhere)["event"] == "metrics"
    assert recover(tmp_path, NONE) == [here]


@pytest.mark.parametrize("end", ["", '{"time": 1, "event": "fin'])
def test_a_last_line_that_was_cut_off_is_no_end(tmp_path: Path, end: str):
    run = begun(tmp_path / "runs" / "a")
    tracker = Tracker(run, None, "a", {})
    tracker.finish("FINISHED")
    assert journal.has_ended(run)
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "run", "name": "a", "host": "' + platform.node() + '"}\n' + end)
    assert not journal.has_ended(run)
    assert recover(tmp_path, NONE) == [run]


def test_a_run_that_its_sender_has_ended_gets_its_result_too(tmp_path: Path):
    run = begun(tmp_path / "runs" / "a")
    journal.append(run, "finish", status="KILLED")
    assert recover(tmp_path, NONE) == []
    assert json.loads((run / "result.json").read_text())["status"] == "KILLED"


def test_a_strangers_folder_is_written_to_through_no_link_and_its_store_left_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gaplab.recovery.start_sender", lambda folder: pytest.fail("sent"))
    outside = tmp_path / "outside"
    outside.write_text(json.dumps({"time": 1, "event": "run", "name": "a", "host": platform.node()}) + "\n")
    before = outside.read_text()
    run = begun(tmp_path / "runs" / "a")
    (run / "journal.jsonl").unlink()
    (run / "journal.jsonl").symlink_to(outside)
    other = begun(tmp_path / "runs" / "b")
    store = {"time": 1, "event": "run", "name": "b", "host": platform.node(), "uri": "sqlite:////elsewhere.db"}
    with (other / "journal.jsonl").open("a") as file:
        file.write(json.dumps(store) + "\n")
    assert recover(tmp_path, NONE) == [other]
    assert outside.read_text() == before
