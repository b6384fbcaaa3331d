"""A run in MLflow: what was put into the journal is what MLflow tells."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import composed

from gaplab import config as configs
from gaplab.tracking.journal import Tracker, journal_of, read_journal
from gaplab.tracking.mlflow import Journal, _follow, main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run as a person starts it, from another folder, with MLflow."""
    home = tmp_path_factory.mktemp("outputs")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = configs.PROJECT / "src" / "train.py"
    arguments = [
        "model.bn=true",
        "trainer.max_epochs=2",
        "data.train_size=2000",
        "trainer.threads=1",
        "+tracking.tags.who=test",
    ]
    done = subprocess.run(
        [sys.executable, str(script), f"paths.outputs={home}", *arguments],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []
    (folder,) = (home / "runs").iterdir()
    return done, home, folder


@pytest.fixture(scope="module")
def run_in_mlflow(finished):
    from mlflow import MlflowClient

    _, home, folder = finished
    result = json.loads((folder / "result.json").read_text())
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    return client, client.get_run(result["run_id"]), result


def test_a_person_sees_epochs_table_and_what_to_type_next(finished):
    done, _, folder = finished
    lines = done.stdout.splitlines()
    assert lines[0] == f"mlp bn s0  in {folder}"
    assert lines[1].startswith("epoch 1/2  loss ")
    result = json.loads((folder / "result.json").read_text())
    low, high = (f"{100 * result['best'][f'gap_acc_{end}']:+.2f}" for end in ("low", "high"))
    assert f"[{low}, {high}]" in done.stdout
    assert "python src/train.py model.bn=false" in done.stdout
    assert "make ui" in done.stdout
    assert done.stderr == ""


def test_the_folder_holds_what_the_contract_says(finished):
    _, _, folder = finished
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}.png" for name in ("learning_curves", "confusion_matrix", "worst_mistakes", "normalization")
    }
    checkpoints = {f"checkpoints/{name}.ckpt{end}" for name in ("last", "best") for end in ("", ".sha256")}
    expected = {"config.yaml", "result.json", "journal.jsonl", "splits.npz"} | figures | checkpoints
    assert expected <= names
    assert names - expected == {"mlflow.json", "mlflow.log", ".mlflow.lock"}
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in figures)


def test_mlflow_has_the_runs_parameters_tags_and_status(run_in_mlflow):
    _, run, result = run_in_mlflow
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mlp bn s0")
    assert run.info.end_time > run.info.start_time
    assert (run.data.params["model.bn"], run.data.params["optimizer.lr"]) == ("True", "0.001")
    assert run.data.tags["condition"] == result["condition"]
    assert run.data.tags["who"] == "test"
    assert "model.bn=true" in run.data.tags["overrides"]
    assert run.data.tags["version/torch"]
    assert run.data.tags["mlflow.source.name"] == "src/train.py"


def test_mlflow_has_every_metric_of_every_epoch(run_in_mlflow):
    client, run, result = run_in_mlflow
    for name in (
        "train/acc",
        "valid/acc",
        "gap/acc",
        "gap/acc_low",
        "gap/acc_high",
        "train/acc_running",
        "gap/loss",
        "lr",
    ):
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2], name
        if name.replace("/", "_") in result:
            assert history[-1].value == result[name.replace("/", "_")]
    assert run.data.metrics["best/valid/acc"] == result["best"]["valid_acc"]
    assert run.data.metrics["test/acc"] == result["test_acc"]


def test_mlflow_has_the_data_set_and_the_artifacts(run_in_mlflow):
    client, run, _ = run_in_mlflow
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, len(given.dataset.digest)) == ("mnist", 16)
    paths = {
        file.path
        for folder in ("", "figures", "checkpoints")
        for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"config.yaml", "splits.npz", "figures/learning_curves.png", "checkpoints/best.ckpt"} <= paths


def test_the_rest_is_sent_when_the_writer_dies(tmp_path: Path):
    code = (
        "import os, sys; sys.path[:0] = [os.environ['SRC']]\n"
        "from pathlib import Path; from gaplab.config import MLflow; from gaplab.tracking.journal import Tracker\n"
        f"t = Tracker(Path({str(tmp_path)!r}), MLflow(uri='sqlite:///{tmp_path}/mlflow.db'), 'killed', {{}})\n"
        "t.metrics({'train/acc': 0.5}, 1); print(t._sender.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SRC": str(configs.PROJECT / "src")},
        capture_output=True,
        text=True,
    )
    sender = int(done.stdout)
    import time

    deadline = time.monotonic() + 60
    while Path(f"/proc/{sender}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(
        json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    )
    assert (run.info.status, run.data.metrics) == ("FAILED", {"train/acc": 0.5})


def test_a_server_that_is_not_there_costs_seconds_and_loses_nothing(tmp_path: Path, capfd):
    tracking = composed("tracking.uri=http://127.0.0.1:9", f"paths.outputs={tmp_path}").tracking
    tracker = Tracker(tmp_path, tracking, "alone", {})
    tracker.metrics({"train/acc": 0.5}, step=1)
    assert tracker.finish("FINISHED") is None
    error = capfd.readouterr().err
    assert error.startswith("MLflow does not have the whole run: ")
    assert error.count("\n") == 1
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["status"] == "FINISHED"


class SenderInThisProcess:
    """Sends all at once when it is waited for; a process of its own takes seconds to import MLflow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def wait(self, timeout: float) -> int:
        return main(self._folder, os.getppid())


@pytest.fixture
def sender_in_this_process(monkeypatch):
    monkeypatch.setattr("gaplab.tracking.journal._start_sender", SenderInThisProcess)


def test_an_event_that_mlflow_refuses_stops_neither_the_others_nor_the_end(
    tmp_path: Path, capfd, sender_in_this_process
):
    tracking = composed(f"paths.outputs={tmp_path}").tracking
    tracker = Tracker(tmp_path, tracking, "refused", {})
    tracker.metrics({"train/acc": 0.25}, step=1)
    tracker.artifact(tmp_path / "nowhere.png")
    tracker.metrics({"train/acc": 0.5}, step=2)
    run_id = tracker.finish("FINISHED")
    assert "nowhere.png" in capfd.readouterr().err
    from mlflow import MlflowClient

    run = MlflowClient(tracking.uri).get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/acc": 0.5})


def test_a_journal_is_read_line_by_whole_line_and_gone_on_with_where_it_was_sent(tmp_path: Path):
    path = journal_of(tmp_path)
    path.write_text('{"time": 1, "event": "tags"}\n{"time": 2, "eve')
    journal = Journal(tmp_path)
    journal.run_id = "r"
    assert [(event["event"], new) for event, new in journal.read()] == [("tags", True)]
    journal.save()
    assert list(journal.read()) == []
    with path.open("a") as file:
        file.write('nt": "finish", "status": "FINISHED"}\n')
    again = Journal(tmp_path)
    assert [(event["event"], new) for event, new in again.read()] == [("tags", False), ("finish", True)]
    assert again.ended
    assert [event["event"] for event, _ in journal.read()] == ["finish"]


def test_a_line_that_a_crash_cut_off_spoils_no_other(tmp_path: Path):
    journal_of(tmp_path).write_text('{"time": 1, "event": "run", "name": "a"}\n{"time": 2, "ev')
    tracker = Tracker(tmp_path, None, "a", {})
    tracker.metrics({"gap/acc": 0.1}, 1)
    tracker.finish("FINISHED")
    assert [event["event"] for event in read_journal(tmp_path)] == ["run", "run", "tags", "metrics", "finish"]


def test_a_later_attempt_and_a_report_go_on_in_the_same_run(tmp_path: Path, sender_in_this_process):
    from mlflow import MlflowClient

    tracking = composed(f"paths.outputs={tmp_path}").tracking
    first = Tracker(tmp_path, tracking, "twice", {})
    first.metrics({"gap/acc": 0.1}, 1)
    run_id = first.finish("FAILED")
    second = Tracker(tmp_path, tracking, "twice", {})
    second.metrics({"gap/acc": 0.1}, 1)
    second.metrics({"gap/acc": 0.2}, 2)
    assert second.finish("FINISHED") == run_id
    page = tmp_path / "report.html"
    page.write_text("what it says")
    added = Tracker.reopen(tmp_path)
    added.artifact(page, "report")
    added.close()
    client = MlflowClient(tracking.uri)
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "gap/acc")] == [(1, 0.1), (2, 0.2)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run_id, "report")] == ["report/report.html"]


class Recorder:
    """Stands for `Sender`: notes what it is given, refuses metrics while `down`."""

    calls: ClassVar[list[tuple[str, str]]] = []
    down = False

    def __init__(self, store) -> None:
        pass

    def adopt(self, parent: str) -> None:
        pass

    def send(self, journal: Journal, event) -> None:
        if self.down and event["event"] == "metrics":
            raise ConnectionError("server is gone")
        journal.run_id = journal.run_id or journal.folder.name
        self.calls.append((journal.folder.name, event.get("status") or event["event"]))


def write(folder: Path, *events: str) -> None:
    folder.mkdir(exist_ok=True)
    with journal_of(folder).open("a") as file:
        for word in events:
            event = {"event": word, "time": 0, "step": 1, "values": {"gap/acc": 0.1}, "path": str(folder / "job")}
            file.write(json.dumps(event | ({"status": "FINISHED"} if word == "finish" else {})) + "\n")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr("gaplab.tracking.mlflow.Sender", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "down", False)
    return Recorder


def test_a_report_that_dies_leaves_the_sweeps_status_as_it_was(tmp_path: Path, recorder):
    sweep = tmp_path / "sweep"
    write(sweep, "run", "child", "finish", "reopen", "artifact")
    write(sweep / "job", "run", "metrics", "finish")
    nobody = 2**22 + 1
    assert list(_follow(sweep, nobody)) == []
    assert [status for name, status in recorder.calls if name == "sweep"][-1] == "close"
    assert ("sweep", "FAILED") not in recorder.calls
    assert recorder.calls.count(("job", "metrics")) == 1


def test_what_a_server_refused_is_sent_by_the_next_sender(tmp_path: Path, recorder):
    sweep = tmp_path / "sweep"
    write(sweep, "run", "child", "finish")
    write(sweep / "job", "run", "metrics", "finish")
    recorder.down = True
    assert [str(error) for error in _follow(sweep, os.getppid())] == ["server is gone"]
    assert ("job", "metrics") not in recorder.calls
    recorder.down = False
    write(sweep, "reopen", "close")
    assert list(_follow(sweep, os.getppid())) == []
    assert recorder.calls.count(("job", "metrics")) == 1


def test_a_sweep_whose_writer_died_is_failed_with_its_open_jobs(tmp_path: Path, recorder):
    sweep = tmp_path / "sweep"
    write(sweep, "run", "child")
    write(sweep / "job", "run", "metrics")
    assert list(_follow(sweep, 2**22 + 1)) == []
    assert recorder.calls[-2:] == [("job", "FAILED"), ("sweep", "FAILED")]
