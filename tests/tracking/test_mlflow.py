"""A run in MLflow: what was put into the journal is what MLflow tells."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import composed, sent, typed

from gaplab import config as configs
from gaplab import launch
from gaplab.config import MLflow, Tracking
from gaplab.errors import TrainingError, UserError
from gaplab.notes import NOTE
from gaplab.tracking import dashboard
from gaplab.tracking.journal import Tracker, journal_of, read_journal, read_receipt
from gaplab.tracking.mlflow import Delivery, RefusedError, follow, is_permanent, main
from gaplab.tracking.outbox import Journal
from gaplab.tracking.sync import sync


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run as a person starts it, from another folder, with MLflow."""
    home = tmp_path_factory.mktemp("outputs")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    arguments = [
        "model.bn=true",
        "trainer.max_epochs=2",
        "data.train_size=2000",
        "trainer.threads=1",
        "tracking.log_model=false",
        "+tracking.tags.who=test",
    ]
    done = typed("train", f"paths.outputs={home}", *arguments, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []
    (folder,) = (home / "runs").iterdir()
    sent(folder)
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
    assert lines[1] == "data    mnist 1x28x28: train 2,000, valid 5,000, test 10,000"
    assert lines[2].startswith("classes 10 in train, of ")
    assert lines[3] == "weights  kaiming_normal in 4 of 4 linear and convolutional layers"
    assert any(line.startswith("epoch 1/2  loss ") for line in lines[4:])
    result = json.loads((folder / "result.json").read_text())
    low, high = (f"{100 * result['best'][f'gap_acc_{end}']:+.2f}" for end in ("low", "high"))
    assert f"[{low}, {high}]" in done.stdout
    assert "model.bn=false    (compare)" in done.stdout
    assert "src/ui.py paths.outputs=" in done.stdout
    assert done.stderr == ""


def test_the_folder_holds_what_the_contract_says(finished):
    _, _, folder = finished
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}.png" for name in ("learning_curves", "confusion_matrix", "worst_mistakes", "normalization")
    }
    checkpoints = {f"checkpoints/{name}.ckpt{end}" for name in ("last", "previous", "best") for end in ("", ".sha256")}
    expected = {"config.yaml", "result.json", "journal.jsonl", "splits.npz", "example.npy"} | figures | checkpoints
    assert expected <= names
    assert names - expected == {"mlflow.json", "mlflow.log", ".mlflow.lock", ".lock"}
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in figures)


def test_mlflow_has_the_runs_parameters_tags_and_status(run_in_mlflow):
    _, run, result = run_in_mlflow
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mlp bn s0")
    assert run.info.end_time > run.info.start_time
    assert (run.data.params["model.bn"], run.data.params["optimizer.lr"]) == ("True", "0.001")
    assert run.data.tags["condition"] == result["condition"]
    assert run.data.tags["who"] == "test"
    assert run.data.tags["data"] == "mnist: 2000 train, 5000 valid, 10000 test"
    free = [
        name for name in run.data.tags if not name.startswith(configs.OWN_TAG_PREFIXES) and name not in configs.OWN_TAGS
    ]
    assert free == ["who"]  # a user's tag cannot take the place of another
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
    assert run.data.metrics["best/gap/acc_pp"] == pytest.approx(100 * result["best"]["gap_acc"], abs=1e-6)
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
    def write_and_die() -> None:
        tracker = Tracker(tmp_path, MLflow(uri=f"sqlite:///{tmp_path}/mlflow.db"), "killed", {})
        tracker.metrics({"train/acc": 0.5}, 1)
        (tmp_path / "sender").write_text(str(tracker._sender.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    writer = multiprocessing.get_context("fork").Process(target=write_and_die)
    writer.start()
    writer.join()
    sender = int((tmp_path / "sender").read_text())
    deadline = time.monotonic() + 60
    while Path(f"/proc/{sender}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(
        json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    )
    assert (run.info.status, run.data.metrics) == ("KILLED", {"train/acc": 0.5})


def test_a_server_that_is_not_there_costs_seconds_and_loses_nothing(tmp_path: Path, capfd):
    tracking = composed("tracking.uri=http://me:secret@127.0.0.1:9", f"paths.outputs={tmp_path}").tracking
    tracker = Tracker(tmp_path, tracking, "alone", {})
    tracker.metrics({"train/acc": 0.5}, step=1)
    start = time.monotonic()
    tracker.wait_for_run()
    assert tracker.finish("FINISHED") is None
    assert time.monotonic() - start < 10.5
    error = capfd.readouterr().err
    assert error.startswith("MLflow does not have the whole run")
    assert error.count("\n") == 1
    assert "python src/sync.py" in error
    assert "secret" not in error
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["status"] == "FINISHED"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Callable[[str], Tracking]:
    """A SQLite store for experiments of any name: making one takes seconds."""
    outputs = tmp_path_factory.mktemp("store")
    return lambda name: composed(f"paths.outputs={outputs}", f"tracking.experiment={name}").tracking


def runs_of(tracking) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking.uri)
    return client.search_runs([client.get_experiment_by_name(tracking.experiment).experiment_id])


class SenderInThisProcess:
    """Sends all at once when it is waited for; a process of its own takes seconds to import MLflow."""

    def __init__(self, folder: Path, *_: object) -> None:
        self._folder = folder

    def poll(self) -> int:
        return main(self._folder, os.getppid())


@pytest.fixture
def sender_in_this_process(monkeypatch):
    monkeypatch.setattr("gaplab.tracking.journal.start_sender", SenderInThisProcess)


def test_an_event_that_mlflow_refuses_stops_neither_the_others_nor_the_end(
    tmp_path: Path, capfd, sender_in_this_process, store
):
    tracking = store("refused")
    tracker = Tracker(tmp_path, tracking, "refused", {})
    tracker.metrics({"train/acc": 0.25}, step=1)
    tracker.artifact(tmp_path / "nowhere.png")
    tracker.metrics({"train/acc": 0.5}, step=2)
    run_id = tracker.finish("FINISHED")
    assert "nowhere.png" in capfd.readouterr().err
    from mlflow import MlflowClient

    run = MlflowClient(tracking.uri).get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/acc": 0.5})


def test_a_description_is_renewed_unless_a_person_has_written_one(tmp_path: Path, sender_in_this_process, store):
    from mlflow import MlflowClient

    tracking = store("described")
    client = MlflowClient(tracking.uri)

    def says(text: str) -> tuple[str, str]:
        tracker = Tracker(tmp_path, tracking, "described", {})
        tracker.tags({NOTE: text, "other": text})
        run_id = tracker.finish("FINISHED")
        tags = client.get_run(run_id).data.tags
        return tags[NOTE], tags["other"]

    assert says("what was asked") == ("what was asked", "what was asked")
    assert says("what was found") == ("what was found", "what was found")
    (run,) = runs_of(tracking)
    client.set_tag(run.info.run_id, NOTE, "my own words")
    assert says("found once more") == ("my own words", "found once more")


def test_an_experiment_gets_its_description_and_views_once(tmp_path: Path, sender_in_this_process, store):
    from mlflow import MlflowClient

    tracking = store("shown")
    client = MlflowClient(tracking.uri)

    def tags() -> dict[str, str]:
        Tracker(tmp_path, tracking, "shown", {}).finish("FINISHED")
        return client.get_experiment_by_name("shown").tags

    first = tags()
    assert {NOTE, *dashboard.views()} < first.keys()
    experiment = client.get_experiment_by_name("shown").experiment_id
    mine = {f"{dashboard.VIEW}mine": "{}", NOTE: "my own words"}
    for name, value in mine.items():
        client.set_experiment_tag(experiment, name, value)
    assert tags() == first | mine


def test_a_store_that_takes_no_description_gets_its_runs(
    tmp_path: Path, capfd, sender_in_this_process, store, monkeypatch
):
    from mlflow import MlflowClient

    def refuse(*_) -> None:
        raise ConnectionError("no")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    tracking = store("plain")
    assert Tracker(tmp_path, tracking, "plain", {}).finish("FINISHED") is not None
    assert [run.info.status for run in runs_of(tracking)] == ["FINISHED"]
    assert capfd.readouterr().err == ""


def test_a_journal_is_read_line_by_whole_line_and_gone_on_with_where_it_was_sent(tmp_path: Path):
    path = journal_of(tmp_path)
    path.write_text('{"time": 1, "event": "tags", "values": {}}\n{"time": 2, "eve')
    journal = Journal(tmp_path)
    journal.run_id = "r"
    assert [(event["event"], new) for event, new in journal.read()] == [("tags", True)]
    journal.sent({})
    journal.save()
    assert journal.read() == []
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


def test_a_later_attempt_and_a_report_go_on_in_the_same_run(tmp_path: Path, sender_in_this_process, store):
    from mlflow import MlflowClient

    tracking = store("twice")
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


def test_a_report_on_a_killed_run_does_not_bring_it_back_to_life(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gaplab.tracking.journal.start_sender", lambda *_: None)
    write(tmp_path / "run", "run", "metrics")
    tracker = Tracker.reopen(tmp_path / "run")
    tracker.close()
    events = list(read_journal(tmp_path / "run"))
    assert [event["event"] for event in events] == ["run", "metrics", "finish", "reopen", "close"]
    assert events[2]["status"] == "KILLED"
    (tmp_path / "other").mkdir()
    Tracker(tmp_path / "other", None, "not in MLflow by itself", {}).finish("FINISHED")
    assert Tracker.reopen(tmp_path / "other") is None


class Recorder:
    """Stands for `Sender`: notes what it is given, and raises what `trouble` says of an event before or after that."""

    calls: ClassVar[list[tuple[str, str]]] = []
    trouble: ClassVar[Callable[[str, str], Exception | None]]

    def __init__(self, store, *_) -> None:
        if error := self.trouble("", "connect"):
            raise error

    def check(self, journal: Journal, parent) -> None:
        pass

    def look_up(self, journal: Journal) -> str:
        return "there"

    def send(self, journal: Journal, entry, parent) -> dict[str, str]:
        name, word = journal.folder.name, entry.event.get("status") or entry.event["event"]
        if error := self.trouble(name, word):
            raise error
        assert (parent is not None) == (name == "job")
        journal.run_id = journal.run_id or name
        self.calls.append((name, word))
        return {}


def write(folder: Path, *events: str) -> None:
    folder.mkdir(exist_ok=True)
    with journal_of(folder).open("a") as file:
        for word in events:
            event = {"event": word, "time": 5, "step": 1, "values": {"gap/acc": 0.1}, "path": str(folder / "job")}
            event |= {"status": "FINISHED"} if word == "finish" else {"uri": "http://server"} if word == "run" else {}
            file.write(json.dumps(event) + "\n")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr("gaplab.tracking.mlflow.Sender", Recorder)
    monkeypatch.setattr("gaplab.tracking.sync.Sender", Recorder)
    monkeypatch.setattr("gaplab.tracking.mlflow.PAUSE_S", 0.05)
    monkeypatch.setattr("gaplab.tracking.mlflow.GIVE_UP_S", 0.3)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "trouble", staticmethod(lambda name, word: None), raising=False)
    return Recorder


def trouble(monkeypatch, function) -> None:
    monkeypatch.setattr(Recorder, "trouble", staticmethod(function))


def in_turn(*answers: Exception | None) -> Iterator[Exception | None]:
    yield from answers
    while True:
        yield None


NOBODY = 2**22 + 1


def test_a_report_that_dies_leaves_the_sweeps_status_as_it_was(tmp_path: Path, recorder):
    sweep = tmp_path / "sweep"
    write(sweep, "run", "child", "finish", "reopen", "artifact")
    write(sweep / "job", "run", "metrics", "finish")
    delivery = follow(sweep, NOBODY)
    assert (delivery.problem, delivery.refused) == (None, [])
    assert [status for name, status in recorder.calls if name == "sweep"][-1] == "close"
    assert ("sweep", "KILLED") not in recorder.calls
    assert recorder.calls.count(("job", "metrics")) == 1


def test_a_server_that_comes_back_gets_everything_once_and_in_order(tmp_path: Path, recorder, monkeypatch):
    write(tmp_path / "run", "run", "tags", "metrics", "finish")
    answers = in_turn(ConnectionError("refused"), None, None, TimeoutError("timed out"), ConnectionError("reset"))
    trouble(monkeypatch, lambda name, word: next(answers))
    delivery = follow(tmp_path / "run", os.getppid())
    assert (delivery.problem, delivery.refused) == (None, [])
    assert [word for _, word in recorder.calls] == ["run", "tags", "metrics", "FINISHED"]
    assert "problem" not in read_receipt(tmp_path / "run")


def test_what_a_server_did_not_take_is_sent_by_the_next_sender(tmp_path: Path, recorder, monkeypatch):
    sweep = tmp_path / "sweep"
    write(sweep, "run", "child", "finish")
    write(sweep / "job", "run", "metrics", "finish")
    trouble(monkeypatch, lambda name, word: ConnectionError("server is gone") if word == "metrics" else None)
    assert follow(sweep, os.getppid()).problem == "server is gone"
    assert read_receipt(sweep)["problem"] == "server is gone"
    assert recorder.calls == [("sweep", "run"), ("sweep", "child"), ("job", "run")]  # its end is not before its jobs'
    trouble(monkeypatch, lambda name, word: None)
    write(sweep, "reopen", "close")
    assert follow(sweep, os.getppid()).problem is None
    assert recorder.calls[3:5] == [("sweep", "FINISHED"), ("sweep", "reopen")]
    assert recorder.calls.count(("job", "metrics")) == 1
    assert "problem" not in read_receipt(sweep)


def test_what_is_refused_for_good_is_left_out_and_told(tmp_path: Path, recorder, monkeypatch, capfd):
    write(tmp_path / "run", "run", "params", "metrics", "finish")
    trouble(monkeypatch, lambda name, word: RefusedError("changed") if word == "params" else None)
    assert main(tmp_path / "run", os.getppid()) == 1
    assert capfd.readouterr().err == "changed\n"
    assert [word for _, word in recorder.calls] == ["run", "metrics", "FINISHED"]


def test_a_run_that_may_not_be_created_waits_as_a_whole(tmp_path: Path, recorder, monkeypatch):
    write(tmp_path / "run", "run", "metrics", "finish")
    trouble(monkeypatch, lambda name, word: RefusedError("the experiment is deleted") if word == "run" else None)
    assert follow(tmp_path / "run", os.getppid()).problem == "the experiment is deleted"
    assert recorder.calls == []
    trouble(monkeypatch, lambda name, word: None)
    assert follow(tmp_path / "run", os.getppid()).problem is None
    assert [word for _, word in recorder.calls] == ["run", "metrics", "FINISHED"]


def test_a_sweep_whose_writer_died_is_killed_with_its_open_jobs(tmp_path: Path, recorder):
    sweep = tmp_path / "sweep"
    write(sweep, "run", "child")
    write(sweep / "job", "run", "metrics")
    assert follow(sweep, NOBODY).problem is None
    assert recorder.calls[-2:] == [("job", "KILLED"), ("sweep", "KILLED")]
    assert [event["time"] for event in read_journal(sweep)][-1] == 5  # when it was last heard of


def test_a_job_that_outlived_its_sweep_is_not_ended(tmp_path: Path, recorder):
    from filelock import FileLock

    sweep = tmp_path / "sweep"
    write(sweep, "run", "child")
    write(sweep / "job", "run", "metrics")
    with FileLock(sweep / "job" / ".lock"):
        follow(sweep, NOBODY)
    assert ("job", "KILLED") not in recorder.calls
    assert recorder.calls[-1] == ("sweep", "KILLED")


def test_a_disk_that_is_full_is_waited_for(tmp_path: Path, recorder, monkeypatch):
    write(tmp_path / "run", "run", "metrics", "finish")
    answers = in_turn(*[OSError(28, "No space left on device")] * 3)

    def write_receipt(folder: Path, receipt) -> None:
        if error := next(answers):
            raise error

    monkeypatch.setattr("gaplab.tracking.outbox.write_receipt", write_receipt)
    assert follow(tmp_path / "run", os.getppid()).problem is None
    assert [word for _, word in recorder.calls] == ["run", "metrics", "FINISHED"]


@pytest.mark.parametrize(
    "receipt",
    ["{", "[]", '{"run_id": 5, "sent": 9}', '{"run_id": "r", "sent": "all"}', '{"run_id": "../x", "sent": 1}'],
)
def test_a_damaged_receipt_counts_as_none(tmp_path: Path, receipt: str, recorder):
    write(tmp_path / "run", "run", "finish")
    (tmp_path / "run" / "mlflow.json").write_text(receipt)
    assert read_receipt(tmp_path / "run") == {}
    follow(tmp_path / "run", os.getppid())
    assert [word for _, word in recorder.calls] == ["run", "FINISHED"]


def test_a_journal_of_damaged_events_is_survived(tmp_path: Path, recorder):
    write(tmp_path / "run", "run")
    with journal_of(tmp_path / "run").open("a") as file:
        file.write(
            '5\n[]\n{"event": 3, "time": 1}\n{"event": "child", "time": 1, "path": "x"}\n'
            '{"event": "metrics", "time": "x"}\n'
        )
    write(tmp_path / "run", "finish")
    assert follow(tmp_path / "run", os.getppid()).problem is None
    assert [word for _, word in recorder.calls] == ["run", "child", "FINISHED"]


def test_errors_that_pass_and_those_that_do_not():
    from mlflow.exceptions import MlflowException, RestException
    from requests import HTTPError, Response

    def answered(status: int) -> HTTPError:
        response = Response()
        response.status_code = status
        return HTTPError("no", response=response)

    for code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
        assert is_permanent(RestException({"error_code": code}))
    for code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED"):
        assert not is_permanent(RestException({"error_code": code}))
    assert not is_permanent(RestException({"error_code": "PERMISSION_DENIED"}))
    assert not is_permanent(MlflowException("API request failed with exception Connection refused"))
    assert is_permanent(answered(413))
    assert not any(is_permanent(answered(status)) for status in (401, 403, 429, 500, 503))
    assert not is_permanent(RuntimeError("who knows"))


def test_nothing_is_sent_twice(tmp_path: Path, sender_in_this_process, store):
    """A receipt that is lost, or an answer, has everything sent once more: MLflow has it once."""
    from mlflow import MlflowClient

    tracking, folder = store("once"), tmp_path / "run"
    folder.mkdir()
    tracker = Tracker(folder, tracking, "once", {})
    tracker.params({f"p{number}": number for number in range(150)})
    tracker.metrics({"gap/acc": 0.1, "time/epoch_s": 1.5}, 1)
    tracker.dataset("mnist", "abc", "here", {"classes": 10})
    run_id = tracker.finish("FINISHED")
    (folder / "mlflow.json").unlink()
    assert main(folder, os.getppid()) == 0
    again = Tracker(folder, tracking, "once", {})
    again.metrics({"gap/acc": 0.1, "time/epoch_s": 1.6}, 1)
    again.metrics({"gap/acc": 0.2, "time/epoch_s": 1.7}, 2)
    assert again.finish("FINISHED") == run_id
    client = MlflowClient(tracking.uri)
    (run,) = runs_of(tracking)
    assert (run.info.run_id, run.info.status, len(run.data.params)) == (run_id, "FINISHED", 150)
    ids = {event["id"] for event in read_journal(folder) if event["event"] == "run"}
    assert ids == {run.data.tags["gaplab.id"]}
    assert run.data.tags["attempt"] == "2"
    assert len(run.inputs.dataset_inputs) == 1
    histories = {name: client.get_metric_history(run_id, name) for name in ("gap/acc", "time/epoch_s")}
    assert [(one.step, one.value) for one in histories["gap/acc"]] == [(1, 0.1), (2, 0.2)]
    assert [(one.step, one.value) for one in histories["time/epoch_s"]] == [(1, 1.5), (2, 1.7)]


def test_a_journal_of_somebody_else_sends_no_other_files(tmp_path: Path, sender_in_this_process, store, capfd):
    from mlflow import MlflowClient

    secret, folder = tmp_path / "secret.txt", tmp_path / "run"
    folder.mkdir()
    secret.write_text("not yours")
    (folder / "link.txt").symlink_to(secret)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "run", "metrics", "finish")
    (folder / "mine.txt").write_text("mine")
    tracking = store("curious")
    tracker = Tracker(folder, tracking, "curious", {})
    for path in (secret, folder / "link.txt", folder / ".." / "secret.txt", folder / "mine.txt"):
        tracker.artifact(path)
    tracker.child(tmp_path / "other")
    tracker.child(folder / "deep" / "other")
    run_id = tracker.finish("FINISHED")
    error = capfd.readouterr().err
    assert error.count("for it lies outside of") == 4  # once more in the last word
    assert error.count("for it does not lie in") == 2
    assert [file.path for file in MlflowClient(tracking.uri).list_artifacts(run_id)] == ["mine.txt"]
    assert len(runs_of(tracking)) == 1


def sync_outputs(outputs: Path) -> None:
    sync(configs.Sync(paths=configs.Paths(outputs=str(outputs))))


def test_sync_sends_what_is_left_and_asks_a_dead_server_once(tmp_path: Path, recorder, monkeypatch, capfd):
    for kind, name in (("runs", "a"), ("runs", "b"), ("runs", "c"), ("sweeps", "s")):
        (tmp_path / kind).mkdir(exist_ok=True)
        write(tmp_path / kind / name, "run", "metrics", "finish")
    (tmp_path / "runs" / "a" / "result.json").write_text('{"run_id": "mine", "status": "FINISHED"}')
    asked = []
    trouble(monkeypatch, lambda name, word: asked.append(word) or ConnectionError("server is gone"))
    with pytest.raises(TrainingError, match=r"^0 runs sent, 4 not: server is gone$"):
        sync_outputs(tmp_path)
    assert asked == ["connect"]
    trouble(monkeypatch, lambda name, word: None)
    sync_outputs(tmp_path)
    assert capfd.readouterr().out.splitlines() == [
        *(f"sent  runs/{name}" for name in "abc"),
        "sent  sweeps/s",
        "4 runs sent",
    ]
    assert json.loads((tmp_path / "runs" / "a" / "result.json").read_text())["run_id"] == "a"
    sent = len(recorder.calls)
    sync_outputs(tmp_path)
    assert capfd.readouterr().out == "nothing to send: MLflow has all of it\n"
    assert len(recorder.calls) == sent


def test_sync_ends_the_killed_and_leaves_alone_who_still_runs_or_is_not_tracked(tmp_path: Path, recorder, capfd):
    from filelock import FileLock

    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("killed", "going"):
        write(runs / name, "run", "metrics")
    (runs / "untracked").mkdir()
    Tracker(runs / "untracked", composed("tracking=none").tracking, "untracked", {}).finish("FINISHED")
    with FileLock(runs / "going" / ".lock"):
        sync_outputs(tmp_path)
    assert recorder.calls == [("killed", "run"), ("killed", "metrics"), ("killed", "KILLED")]
    assert capfd.readouterr().out == "sent  runs/killed\n1 run sent, 1 still going\n"
    assert [event["event"] for event in read_journal(runs / "going")] == ["run", "metrics"]


@pytest.fixture
def mlflow_run(tmp_path: Path, store, monkeypatch, sender_in_this_process, request):
    """A folder in `tmp_path`/runs, its tracker, a client and a way to send what is written so far."""
    from mlflow import MlflowClient

    monkeypatch.setattr("gaplab.tracking.mlflow.GIVE_UP_S", 0.0)
    tracking = store(request.function.__name__)

    def begin(folder: Path = tmp_path / "runs" / "one") -> tuple[Path, Tracker, MlflowClient, Callable[[], Delivery]]:
        folder.mkdir(parents=True, exist_ok=True)
        tracker, delivery = Tracker(folder, tracking, "one", {}), Delivery(folder)

        def send() -> Delivery:
            delivery.read()
            delivery.send()
            return delivery

        return folder, tracker, MlflowClient(tracking.uri), send

    return begin


def epochs(client, run_id: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, "gap/acc")]


def write_epochs(tracker: Tracker, *numbers: int) -> None:
    for number in numbers:
        tracker.metrics({"gap/acc": 0.0573}, number)


def hard_delete(client, run_id: str) -> None:
    """What `mlflow gc` does."""
    from mlflow.tracking._tracking_service.utils import _get_store

    client.delete_run(run_id)
    _get_store(client.tracking_uri)._hard_delete_run(run_id)


def test_a_run_that_is_deleted_while_it_trains_gets_the_rest_when_it_is_restored(tmp_path, mlflow_run, capfd):
    folder, tracker, client, send = mlflow_run()
    write_epochs(tracker, 1)
    run_id = send().root.run_id
    client.delete_run(run_id)
    write_epochs(tracker, 2)
    assert send().problem == f"{folder}: its run is deleted in MLflow; restored there, it gets the rest"
    write_epochs(tracker, 3)
    tracker.finish("FINISHED")
    assert "its run is deleted in MLflow" in capfd.readouterr().err
    sync_outputs(tmp_path)
    assert capfd.readouterr().out.splitlines() == [
        f"left  {folder}: its run is deleted in MLflow; restored there, it gets the rest",
        "0 runs sent, 1 deleted in MLflow",
    ]
    client.restore_run(run_id)
    sync_outputs(tmp_path)
    assert capfd.readouterr().out == "sent  runs/one\n1 run sent\n"
    assert (epochs(client, run_id), client.get_run(run_id).info.status) == ([1, 2, 3], "FINISHED")
    sync_outputs(tmp_path)
    assert capfd.readouterr().out == "nothing to send: MLflow has all of it\n"


def drop_epochs(folder: Path, client) -> None:
    """What an earlier gaplab did beside a run that was deleted and restored."""
    run_id = read_receipt(folder)["run_id"]
    hard_delete(client, run_id)
    (folder / "mlflow.json").unlink()
    tracking_id = next(read_journal(folder))["id"]
    experiment = client.search_experiments()[0].experiment_id
    made = client.create_run(experiment, tags={"gaplab.id": tracking_id})
    when = next(event["time"] for event in read_journal(folder) if event["event"] == "metrics")
    client.log_metric(made.info.run_id, "gap/acc", 0.0573, timestamp=round(when * 1000), step=1)
    receipt = {"run_id": made.info.run_id, "sent": journal_of(folder).stat().st_size}
    (folder / "mlflow.json").write_text(json.dumps(receipt))


MEANWHILE: dict[str, Callable] = {
    "mlflow gc": lambda folder, client: hard_delete(client, read_receipt(folder)["run_id"]),
    "half of the epochs are not there": drop_epochs,
    "another folder's receipt": lambda folder, client: (folder / "mlflow.json").write_text(
        json.dumps(
            {
                "run_id": client.create_run("0", tags={"gaplab.id": "0" * 32}).info.run_id,
                "sent": journal_of(folder).stat().st_size,
            }
        )
    ),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_sync_asks_the_store_what_it_has(what: str, tmp_path, mlflow_run, capfd):
    folder, tracker, client, _ = mlflow_run()
    write_epochs(tracker, 1, 2, 3)
    tracker.finish("FINISHED")
    sync_outputs(tmp_path)
    assert capfd.readouterr().out == "nothing to send: MLflow has all of it\n"
    MEANWHILE[what](folder, client)
    sync_outputs(tmp_path)
    assert capfd.readouterr().out == "sent  runs/one\n1 run sent\n"
    run = client.get_run(read_receipt(folder)["run_id"])
    assert (epochs(client, run.info.run_id), run.info.status) == ([1, 2, 3], "FINISHED")
    assert run.data.tags["gaplab.id"] == next(read_journal(folder))["id"]
    sync_outputs(tmp_path)
    assert capfd.readouterr().out == "nothing to send: MLflow has all of it\n"


def test_an_experiment_that_is_renamed_keeps_its_runs(tmp_path, mlflow_run, capfd):
    _, tracker, client, send = mlflow_run()
    run_id = send().root.run_id
    experiment = client.get_run(run_id).info.experiment_id
    name = client.get_experiment(experiment).name
    write_epochs(tracker, 1)
    client.rename_experiment(experiment, f"{name}, renamed")
    tracker.finish("FINISHED")
    assert (epochs(client, run_id), client.get_experiment_by_name(name)) == ([1], None)


def test_a_sweep_whose_run_is_gone_gets_its_jobs_back(tmp_path, mlflow_run, capfd):
    sweep, tracker, client, _ = mlflow_run(tmp_path / "sweeps" / "s")
    tracker.child(sweep / "job")
    (sweep / "job").mkdir()
    job = Tracker(sweep / "job", None, "job", {})
    write_epochs(job, 1, 2)
    job.finish("FINISHED")
    tracker.finish("FINISHED")
    child = read_receipt(sweep / "job")["run_id"]
    hard_delete(client, read_receipt(sweep)["run_id"])
    sync_outputs(tmp_path)
    assert read_receipt(sweep / "job")["run_id"] == child
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == read_receipt(sweep)["run_id"]
    assert epochs(client, child) == [1, 2]
    client.delete_run(child)
    write(sweep, "reopen", "tags", "close")
    assert main(sweep, os.getppid()) == 0  # the others do not wait for it


def test_a_folder_that_was_moved_sends_its_files_and_jobs(tmp_path, mlflow_run, capfd):
    folder, tracker, client, _ = mlflow_run(tmp_path / "before" / "sweeps" / "s")
    (folder / "job").mkdir()
    (folder / "sweep.json").write_text("{}")
    tracker.child(folder / "job")
    tracker.artifact(folder / "sweep.json")
    job = Tracker(folder / "job", None, "job", {})
    job.finish("FINISHED")
    tracker._sender = None
    tracker.finish("FINISHED")
    (tmp_path / "before").rename(tmp_path / "after")
    sync_outputs(tmp_path / "after")
    assert capfd.readouterr().out == "sent  sweeps/s\n1 run sent\n"
    moved = tmp_path / "after" / "sweeps" / "s"
    assert [file.path for file in client.list_artifacts(read_receipt(moved)["run_id"])] == ["sweep.json"]
    assert client.get_run(read_receipt(moved / "job")["run_id"]).info.status == "FINISHED"


def test_a_copy_of_a_folder_that_is_gone_on_with_is_a_run_of_its_own(tmp_path, mlflow_run):
    folder, tracker, client, _ = mlflow_run()
    write_epochs(tracker, 1)
    tracker.finish("KILLED")
    copy = shutil.copytree(folder, folder.with_name("copy"))
    _, again, _, _ = mlflow_run(copy)
    write_epochs(again, 2)
    again.finish("FINISHED")
    first, second = (read_receipt(one)["run_id"] for one in (folder, copy))
    assert (epochs(client, first), epochs(client, second)) == ([1], [1, 2])
    _, moved, _, _ = mlflow_run(folder.rename(folder.with_name("moved")))
    write_epochs(moved, 2)
    assert moved.finish("FINISHED") == first
    assert epochs(client, first) == [1, 2]


def test_what_mlflow_refuses_is_kept_with_its_reason_and_takes_nothing_with_it(tmp_path, mlflow_run, capfd):
    folder, tracker, client, _ = mlflow_run()
    tracker.params({f"p{number}": number for number in range(73)} | {"p@": 1})
    tracker.tags({"first": "1", "a@b": "x", "last": "2"})
    tracker.metrics({"gap/acc": 0.0573, "valid/recall/a,b": 0.5}, 1)
    run = client.get_run(tracker.finish("FINISHED"))
    assert (len(run.data.params), run.data.tags["first"], run.data.tags["last"]) == (73, "1", "2")
    assert run.data.metrics["gap/acc"] == 0.0573
    assert run.info.status == "FINISHED"
    names = [name for values in read_receipt(folder)["refused"].values() for name in values]
    assert names == ["p@", "a@b", "valid/recall/a,b"]
    assert capfd.readouterr().err.count("(and 2 more)") == 1
    client.set_tag(run.info.run_id, "first", "changed by a person")
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"0 runs sent, 1 not: MLflow refused .*one: p@: Invalid value"):
            sync_outputs(tmp_path)
    assert client.get_run(run.info.run_id).data.tags["first"] == "changed by a person"


def test_a_server_that_fails_now_and_then_beside_asynchronous_logging_loses_no_epoch(mlflow_run, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setattr("gaplab.tracking.mlflow.PAUSE_S", 0.0)
    monkeypatch.setattr("gaplab.tracking.mlflow.GIVE_UP_S", 5.0)
    log, calls = SqlAlchemyStore._log_metrics, itertools.count()

    def now_and_then(*arguments, **more) -> None:
        if next(calls) % 2 == 0:
            raise MlflowException("503", error_code=TEMPORARILY_UNAVAILABLE)
        log(*arguments, **more)

    monkeypatch.setattr(SqlAlchemyStore, "_log_metrics", now_and_then)
    _, tracker, client, _ = mlflow_run()
    write_epochs(tracker, 1, 2, 3, 4)
    assert epochs(client, tracker.finish("FINISHED")) == [1, 2, 3, 4]


def test_the_registry_is_in_the_store_whatever_a_variable_says(tmp_path, store, monkeypatch):
    from gaplab.tracking.registry import Registry

    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/other.db")
    assert Registry(store("any").uri, "gaplab").versions() == []
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 54321"), OSError("No username set")])
def test_a_user_without_a_name_gets_the_run(error: Exception, mlflow_run, monkeypatch):
    def getuser() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", getuser)
    _, tracker, client, _ = mlflow_run()
    assert client.get_run(tracker.finish("FINISHED")).data.tags["mlflow.user"] == str(os.getuid())


def test_gaps_are_in_percentage_points_too_and_the_data_is_a_tag(mlflow_run):
    _, tracker, client, _ = mlflow_run()
    tracker.dataset("mnist", "abc", "here", {"train": 500, "valid": 100, "classes": 10})
    tracker.metrics({"gap/acc": 0.1 + 0.2 - 0.25, "gap/acc_low": -0.01, "train/acc": 0.9, "gap/loss": 0.1}, 1)
    tracker.metrics({"best/gap/acc": 0.04, "gap/acc_clean": 0.02}, 1)
    run = client.get_run(tracker.finish("FINISHED"))
    points = {name: value for name, value in run.data.metrics.items() if name.endswith("_pp")}
    assert points == {"gap/acc_pp": 5.0, "gap/acc_low_pp": -1.0, "best/gap/acc_pp": 4.0, "gap/acc_clean_pp": 2.0}
    assert run.data.tags["data"] == "mnist: 500 train, 100 valid"


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"a@b": "x"}, "tracking.tags.a@b: MLflow takes no such name"),
        ({"a//b": "x"}, "tracking.tags.a//b: MLflow takes no such name"),
        ({"a" * 251: "x"}, "MLflow takes no such name"),
        ({"long": "x" * 8001}, "tracking.tags.long: 8001 characters; MLflow takes at most 8000"),
        ({"condition": "mine"}, "tracking.tags.condition: gaplab sets this tag itself; choose another name"),
        ({"git/commit": "mine"}, "tracking.tags.git/commit: gaplab sets"),
        ({"mlflow.user": "me"}, "tracking.tags.mlflow.user: gaplab sets"),
    ],
)
def test_a_tag_that_cannot_be_is_refused_before_the_run(tags: dict[str, str], said: str):
    config = composed()
    with pytest.raises(UserError, match=re.escape(said)):
        configs.check(replace(config, tracking=replace(config.tracking, tags=tags)))
    good = {"team/é name": "", "git": "x", "a.b-c_d:e": "y"}
    configs.check(replace(config, tracking=replace(config.tracking, tags=good)))


def test_the_jobs_of_a_sweep_get_the_users_tags(tmp_path: Path):
    config = composed(f"paths.outputs={tmp_path}", "+tracking.tags.team=vision")
    (tmp_path / "job").mkdir()
    with pytest.raises(TrainingError, match="stop"), launch.opened(config, tmp_path / "job", in_sweep=True):
        raise TrainingError("stop")
    tags = next(event["values"] for event in read_journal(tmp_path / "job") if event["event"] == "tags")
    assert (tags["team"], tags["condition"]) == ("vision", configs.condition(config))


@pytest.mark.parametrize(("status", "kept"), [(0, False), (1, True), (2, False), (3, True)])
def test_sync_logs_a_model_from_any_folder(status: int, kept: bool, tmp_path, mlflow_run, monkeypatch, capfd):
    folder, tracker, client, _ = mlflow_run()
    tracker._sender = None
    tracker.finish("FINISHED", model=True)
    calls = []

    def run(command: list[str], env: dict[str, str], **_) -> "subprocess.CompletedProcess[str]":
        calls.append((command, env))
        return subprocess.CompletedProcess(command, status, "", "why not\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gaplab.tracking.mlflow.subprocess.run", run)
    for _ in range(2):
        with contextlib.suppress(TrainingError):
            sync(configs.Sync(configs.Paths(str(tmp_path)), ["gaplab", "mine"]))
    assert [command[-1] for command, _ in calls] == ["gaplab,mine"] * (1 + kept)
    command, environment = calls[0]
    assert command[1:3] == ["-m", "gaplab.export"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(configs.PROJECT / "src")
    assert environment["PYTHONSAFEPATH"] == "1"  # a file mlflow.py in the current folder is not imported
    assert environment["MLFLOW_TRACKING_URI"] == client.tracking_uri
    problem = client.get_run(read_receipt(folder)["run_id"]).data.tags.get("model/problem")
    assert problem == ("why not" if status > 1 else None)


def test_sync_as_a_command(tmp_path: Path):
    for words, status, said in (
        (["--help"], 0, "paths.outputs="),
        ([f"paths.outputs={tmp_path}"], 0, "nothing to send"),
        (["paths.outputs=nowhere"], 2, f"error: paths.outputs={tmp_path}/nowhere: no such folder"),
    ):
        done = typed("sync", *words, cwd=tmp_path)
        assert done.returncode == status
        assert said in (done.stdout if status == 0 else done.stderr)
        assert done.stderr.count("\n") == (status != 0)
