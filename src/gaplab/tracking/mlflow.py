"""The sender: follows the journal of a run, or of a sweep and all of its jobs, and puts it into MLflow.

Run as `python -m gaplab.tracking.mlflow <folder> <pid of the writer>`. It ends with status 0 when everything is sent,
and with 1 and one line of reason when MLflow did not take something. How far it came with a journal is in
`mlflow.json` beside it, so that another sender can go on there.
"""

import contextlib
import getpass
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gaplab.files import write_whole
from gaplab.tracking.journal import journal_of, read_receipt

# the whole wait for a server that does not answer stays below 10 s; no request leaves for anyone but the server
for name, value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(name, value)


class Journal:
    """One journal as it grows, and the MLflow run that it becomes.

    Attributes:
        run_id: None until the run is in MLflow.
        ended: whether the newest event is the end of the run, or of what a report added to it.
        reopened: whether the newest beginning is a report's.
        refused: whether MLflow did not take some event; from there on all is sent once more another time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        receipt = read_receipt(folder)
        self.run_id: str | None = receipt.get("run_id")
        self.ended = self.reopened = self.refused = False
        self.measured: dict[tuple[str, int], float] = {}
        self._sent = int(receipt.get("sent", 0))
        self._seen = 0
        self._rest = b""

    def read(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """The events written since the last call, each with whether it is yet to be sent."""
        path = journal_of(self.folder)
        if not path.is_file() or path.stat().st_size == self._seen + len(self._rest):
            return
        with path.open("rb") as file:  # not kept open: a sweep may have more jobs than a process may have files
            file.seek(self._seen)
            *lines, self._rest = file.read().split(b"\n")
        for line in lines:
            self._seen += len(line) + 1
            try:
                event = json.loads(line)
            except ValueError:  # cut off by a crash
                continue
            if event["event"] in ("run", "reopen"):
                self.reopened = event["event"] == "reopen"
            self.ended = event["event"] == ("close" if self.reopened else "finish")
            yield event, self._seen > self._sent
            if event["event"] == "metrics":
                self.measured |= {(name, event["step"]): value for name, value in event["values"].items()}

    def save(self) -> None:
        """Remember that all that was read is sent."""
        if self.run_id is not None and self._seen > self._sent and not self.refused:
            self._sent = self._seen
            receipt = {"run_id": self.run_id, "sent": self._sent}
            write_whole(self.folder / "mlflow.json", json.dumps(receipt) + "\n")


class Sender:
    """Puts events into MLflow; `parent` is the run of the sweep that later runs belong to."""

    def __init__(self, store: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        with _initializing(store["uri"]):
            self.client = MlflowClient(tracking_uri=store["uri"])
            self._experiment = self._find_experiment(store["experiment"], store["artifacts"] or _beside(store["uri"]))
        self._parent: str | None = None
        self._known: dict[str, str] = {}

    def adopt(self, parent: str) -> None:
        """Let later runs be children of `parent`; those that an earlier sender made go on."""
        self._parent = parent
        runs = self.client.search_runs([self._experiment], f"tags.mlflow.parentRunId = '{parent}'", max_results=50_000)
        self._known = {run.data.tags["job"]: run.info.run_id for run in runs if "job" in run.data.tags}

    def _find_experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(
                    self.client.create_experiment(
                        name, artifacts, tags={"mlflow.experimentKind": "custom_model_development"}
                    )
                )
            except MlflowException:  # another start was faster
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def begin(self, journal: Journal, event: dict[str, Any]) -> None:
        """Create the run, or set it running once more."""
        journal.run_id = journal.run_id or self._known.get(journal.folder.name)
        if journal.run_id is not None:
            self.client.update_run(journal.run_id, "RUNNING")
            return
        tags = {"mlflow.source.name": "src/train.py", "mlflow.source.type": "LOCAL", "mlflow.user": getpass.getuser()}
        if self._parent is not None:
            tags |= {"mlflow.parentRunId": self._parent, "job": journal.folder.name}
        run = self.client.create_run(self._experiment, _ms(event), tags, event["name"])
        journal.run_id = run.info.run_id

    def send(self, journal: Journal, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        if event["event"] == "run":
            self.begin(journal, event)
        run_id = journal.run_id
        if run_id is None:
            raise RuntimeError(f"{journal.folder}: its run could not be created")
        match event["event"]:
            case "params":
                items = list(event["values"].items())
                for start in range(0, len(items), 100):  # the most that one call takes
                    self.client.log_batch(run_id, params=[Param(*item) for item in items[start : start + 100]])
            case "tags":
                self.client.log_batch(run_id, tags=[RunTag(*item) for item in event["values"].items()])
            case "metrics":
                when, step = _ms(event), event["step"]
                metrics = [
                    Metric(name, value, when, step)
                    for name, value in event["values"].items()
                    if journal.measured.get((name, step)) != value  # a later attempt measures the same once more
                ]
                self.client.log_batch(run_id, metrics=metrics)
            case "dataset":
                dataset = Dataset(
                    name=event["name"],
                    digest=event["digest"],
                    source_type="local",
                    source=json.dumps({"uri": event["source"]}),
                    profile=json.dumps(event["profile"]),
                )
                tag = InputTag("mlflow.data.context", "training")
                self.client.log_inputs(run_id, [DatasetInput(dataset, [tag])])
            case "artifact":
                self.client.log_artifact(run_id, event["path"], event["folder"] or None)
            case "finish":
                self.client.set_terminated(run_id, event["status"], _ms(event))


def _beside(uri: str) -> str | None:
    """The artifact folder beside a SQLite store; None leaves the choice to a server."""
    return str(Path(uri.removeprefix("sqlite:///")).with_name("artifacts")) if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _initializing(uri: str) -> Iterator[None]:
    """Let one process at a time create a SQLite store: two at once would both try, and one fail."""
    from filelock import FileLock

    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    with FileLock(database.with_name(f".{database.name}.lock")):
        yield


def _ms(event: dict[str, Any]) -> int:
    return round(event["time"] * 1000)


def main(folder: Path, writer: int) -> int:
    from filelock import FileLock

    with FileLock(folder / ".mlflow.lock"):  # an earlier sender of this folder may still be at the end of its work
        return _complain(list(_follow(folder, writer)))


def _follow(folder: Path, writer: int) -> Iterator[Exception]:
    """Send all that is and will be written, until the root journal ends or its writer dies; what MLflow refused."""
    root = Journal(folder)
    children: dict[Path, Journal] = {}
    end: dict[str, Any] | None = None
    sender: Sender | None = None
    while end is None:
        alive = os.getppid() == writer  # before reading, so that its last words are read
        for journal in itertools.chain([root], children.values()):
            for event, new in journal.read():
                try:
                    if sender is None:
                        sender = Sender(event)
                        if root.run_id is not None:
                            sender.adopt(root.run_id)
                except Exception as error:  # whatever MLflow or the network came up with; there is nowhere to send to
                    yield error
                    return
                if event["event"] == "child":
                    children.setdefault(Path(event["path"]), Journal(Path(event["path"])))
                elif journal is root and root.ended:
                    end = event  # after its children's
                elif new:
                    yield from _try(sender, journal, event)
                    if journal is root and event["event"] == "run" and root.run_id is not None:
                        sender.adopt(root.run_id)
                        root.save()
            if journal is not root or not root.ended:
                journal.save()
        if not root.ended:  # it was gone on with after the end that was read
            end = None
        if not alive and end is None:
            last = {"event": "close"} if root.reopened else {"event": "finish", "status": "FAILED"}
            end = {"time": time.time()} | last
        time.sleep(0.1 if end is None else 0)
    assert sender is not None
    for journal in children.values():
        if journal.run_id is not None and not journal.ended:
            yield from _try(sender, journal, end | {"event": "finish", "status": "FAILED"})
    yield from _try(sender, root, end)
    root.save()


def _try(sender: Sender, journal: Journal, event: dict[str, Any]) -> Iterator[Exception]:
    """The other events, and the end of the run above all, are to arrive even when MLflow refuses this one."""
    try:
        sender.send(journal, event)
    except Exception as error:
        journal.refused = True
        yield error


def _complain(failures: list[Exception]) -> int:
    for error in failures[:1]:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        print((str(error).strip().partition("\n")[0] or type(error).__name__) + more, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
