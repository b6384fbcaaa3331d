"""The sender: follows the journal of a run, or of a sweep and all of its jobs, and puts it into MLflow.

Run as `python -m gaplab.tracking.mlflow <folder> <pid of the writer> <allowed package,…>`. Events go out in order.
One that MLflow does not take now is tried again until it does; one that it never will take is left out. It ends with
status 0 when everything is sent, and with 1 and one line of reason when not; another sender, or `python src/sync.py`,
then goes on.

Nothing is sent twice: a run is looked for by its own id (the tag `gaplab.id`) before it is created, and MLflow keeps a
metric of the same name, time, step and value once.
"""

import contextlib
import getpass
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gaplab.config import USUAL_TARGETS, masked
from gaplab.files import read_json, write_whole
from gaplab.notes import NOTE
from gaplab.tracking import dashboard
from gaplab.tracking.outbox import Entry, Journal

HTTP_TIMEOUT_S = 20  # nobody waits for the sender
PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
GIVE_UP_S = 8.0
BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # the most that one call takes
PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
PASSING_STATUS = (401, 403, 404, 407, 408, 409, 425, 429)  # 404: a proxy whose server is away


class RefusedError(Exception):
    """What MLflow will not take later either."""


class ModelError(Exception):
    """A model that is not logged yet."""


class Sender:
    """Puts events into the MLflow that `store` names. Raises whatever MLflow or the network come up with.

    Args:
        store: the event that names it.
        allowed_targets: packages that the config of a run may name when its model is logged.
    """

    def __init__(self, store: dict[str, Any], allowed_targets: Sequence[str] = USUAL_TARGETS) -> None:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # who sends tries again by himself
        given = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "")
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(HTTP_TIMEOUT_S, int(given) if given.isdigit() else 0))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # no request leaves for anyone but the server
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient

        self._uri = uri = store["uri"]
        self._allowed_targets = allowed_targets
        with _initializing(uri):
            self.client = MlflowClient(tracking_uri=uri)
            self._experiment = self._find_experiment(
                str(store.get("experiment")), store.get("artifacts") or _beside(uri)
            )

    def _find_experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                made = str(self.client.create_experiment(name, artifacts, tags=tags))
                self._show(made, {})
                return made
            except MlflowException:  # another start was faster
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise RefusedError(f"the experiment {name} is deleted in MLflow; restore it, or name another")
        self._show(str(found.experiment_id), found.tags)
        return str(found.experiment_id)

    def _show(self, experiment: str, tags: dict[str, str]) -> None:
        """Describe the experiment and give its pages gaplab's views; no reason to keep a run from MLflow."""
        with contextlib.suppress(Exception):  # of MLflow, the network
            for name, value in dashboard.missing(tags).items():
                self.client.set_experiment_tag(experiment, name, value)

    def begin(self, journal: Journal, entry: Entry, parent: str | None) -> None:
        """Create the run, or set it running once more; `parent` is the run of the sweep that it belongs to."""
        if journal.run_id is None and journal.id is not None:  # was created, and the answer lost
            wanted = f"tags.`gaplab.id` = '{journal.id}'"
            for run in self.client.search_runs([self._experiment], wanted, max_results=1):
                journal.run_id = run.info.run_id
        if journal.run_id is not None:
            self.client.update_run(journal.run_id, "RUNNING")
            self.client.set_tag(journal.run_id, "attempt", str(entry.attempt))
            return
        tags = {"mlflow.source.name": "src/train.py", "mlflow.source.type": "LOCAL", "mlflow.user": getpass.getuser()}
        tags |= {"attempt": str(entry.attempt)} | ({"gaplab.id": journal.id} if journal.id else {})
        if parent is not None:
            tags |= {"mlflow.parentRunId": parent, "job": journal.folder.name}
        run = self.client.create_run(self._experiment, _ms(entry.event), tags, str(entry.event.get("name")))
        journal.run_id = run.info.run_id

    def send(self, journal: Journal, entry: Entry, parent: str | None = None) -> None:
        """Send the event of an entry. Raises RefusedError for what is no event at all."""
        if entry.event["event"] == "run":
            self.begin(journal, entry, parent)
            return
        if journal.run_id is None:
            raise RefusedError(f"{journal.folder}: {entry.event['event']} before the run began")
        try:
            calls = list(self._calls(journal, journal.run_id, entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RefusedError(f"{journal.folder}: a damaged event ({type(error).__name__}: {error})") from None
        for call in calls:
            call()

    def _calls(self, journal: Journal, run_id: str, entry: Entry) -> Iterator[Callable[[], Any]]:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        event = entry.event
        match event["event"]:
            case "params":
                yield from self._batches(run_id, "params", [Param(*item) for item in event["values"].items()])
            case "tags":
                tags = [RunTag(*item) for item in event["values"].items() if item[0] != NOTE]
                yield from self._batches(run_id, "tags", tags)
                if note := event["values"].get(NOTE):
                    yield partial(self._describe, journal, run_id, str(note))
            case "metrics":
                when, step = _ms(event), int(event["step"])
                metrics = [
                    Metric(name, float(value), when, step)
                    for name, value in event["values"].items()
                    if not journal.measured_before(name, step, value)
                ]
                yield from self._batches(run_id, "metrics", metrics)
            case "dataset":
                dataset = Dataset(
                    name=event["name"],
                    digest=event["digest"],
                    source_type="local",
                    source=json.dumps({"uri": event["source"]}),
                    profile=json.dumps(event["profile"]),
                )
                tag = InputTag("mlflow.data.context", "training")
                yield partial(self.client.log_inputs, run_id, [DatasetInput(dataset, [tag])])
            case "artifact":
                path = Path(event["path"]).resolve()
                if not path.is_relative_to(journal.folder.resolve()):  # whose journal is this?
                    raise RefusedError(f"{path}: not sent, for it lies outside of {journal.folder}")
                if path.is_file():
                    yield partial(self.client.log_artifact, run_id, str(path), event["folder"] or None)
                elif entry.attempt == journal.attempts:  # a later attempt clears away what an earlier one made
                    raise RefusedError(f"{path}: no longer there")
            case "model":
                yield partial(self._log_model, journal.folder, run_id)
            case "finish":
                yield partial(self.client.set_terminated, run_id, event["status"], _ms(event))

    def _log_model(self, folder: Path, run_id: str) -> None:
        """In a process of its own: it needs torch, and the config of the run names classes."""
        command = [sys.executable, "-m", "gaplab.export", str(folder), run_id, ",".join(self._allowed_targets)]
        done = subprocess.run(
            command, env=os.environ | {"MLFLOW_TRACKING_URI": self._uri}, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        said = (done.stderr.strip().splitlines() or ["its process ended without a word"])[-1]
        if done.returncode != 2:
            raise ModelError(said)
        self.client.set_tag(run_id, "model/problem", said[:5000])
        raise RefusedError(f"{folder}: its model is not logged: {said}")

    def _describe(self, journal: Journal, run_id: str, note: str) -> None:
        """Unless a person has written a description meanwhile."""
        if self.client.get_run(run_id).data.tags.get(NOTE) in (None, "", journal.described):
            self.client.set_tag(run_id, NOTE, note)

    def _batches(self, run_id: str, kind: str, items: list[Any]) -> Iterator[Callable[[], Any]]:
        for start in range(0, len(items), BATCH[kind]):
            batch: dict[str, Any] = {kind: items[start : start + BATCH[kind]]}
            yield partial(self.client.log_batch, run_id, **batch)


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


def is_permanent(error: Exception) -> bool:
    """Whether MLflow would say the same the next time; what is not known passes."""
    if isinstance(error, RefusedError | PermissionError):  # a server's artifact folder that this machine cannot write
        return True
    if type(error.__cause__).__module__.partition(".")[0] == "sqlalchemy":  # the store's trouble, not the event's
        return False
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return getattr(error, "error_code", None) in PERMANENT or (400 <= status < 500 and status not in PASSING_STATUS)


def reason(error: Exception, uri: str = "") -> str:
    """One short line, without passwords."""
    where = uri if "://" in uri and not uri.startswith("sqlite") else "MLflow"
    whole, cause = "", error
    while cause is not None:
        whole, cause = f"{whole} {cause}", cause.__cause__ or cause.__context__  # type: ignore[assignment]
    if found := re.search(r"too many (\d+) error responses", whole):
        text = f"{where} answers {found[1]}"
    elif "timed out" in whole:
        text = f"{where} does not answer"
    elif "onnection" in whole and (found := re.search(r"\[Errno -?\d+\] ([\w ]+)", whole)):
        text = f"{where}: {found[1]}"
    elif "Connection aborted" in whole:
        text = f"{where} closes the connection"
    else:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
    return masked(text)[:300]


class Delivery:
    """All that is in a folder, a run's or a sweep's with its jobs', on its way into MLflow.

    Attributes:
        root, children: the journal of the folder, and those of the jobs in it.
        problem: why the rest is not sent, or None.
        refused: what MLflow will never take.
        progress: how many events are sent.
    """

    def __init__(self, folder: Path, allowed_targets: Sequence[str] = USUAL_TARGETS) -> None:
        self._allowed_targets = allowed_targets
        self.root = Journal(folder)
        self.children: dict[Path, Journal] = {}
        self.problem: str | None = None
        self.refused: list[str] = []
        self.progress = 0
        self._sender: Sender | None = None

    @property
    def is_complete(self) -> bool:
        return self.problem is None and self.root.ended and not self.root.waiting and not self._open_children()

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to send, nor to end."""
        begun = [child for child in self.children.values() if child.attempts]
        return self.is_complete and all(child.ended for child in begun)

    def _open_children(self) -> list[Journal]:
        return [child for child in self.children.values() if child.waiting]

    def read(self) -> None:
        """Take in what was written since the last time."""
        for event, new in self.root.read():
            if event["event"] == "child":
                path = Path(str(event.get("path")))
                if path.resolve().parent == self.root.folder.resolve():
                    self.children.setdefault(path, Journal(path))
                elif new:
                    self._refuse(RefusedError(f"{path}: not sent, for it does not lie in {self.root.folder}"))
        for child in self.children.values():
            child.read()

    def send(self, sender: Sender | None = None, orphaned: bool = False) -> None:
        """Send in order until all is sent or something does not get through, which `problem` then says.

        Args:
            sender: to use instead of one of its own.
            orphaned: whoever wrote the journal is dead, so its run ends here.
        """
        child = None
        uri = self.root.store["uri"] if self.root.store else ""
        try:
            if orphaned and not self.root.ended:
                self.root.end_as_killed()
            if self.root.ended:  # so have its jobs, one way or another
                for child in self.children.values():
                    if child.attempts and not child.ended:
                        child.end_as_killed()
            child = None
            if self.root.waiting or self._open_children():
                if self._sender is None:
                    assert self.root.store is not None, "no event says where to send"
                    self._sender = sender or Sender(self.root.store, self._allowed_targets)
                self._send_all(self._sender, self.root, keep=int(self.root.ended))
                for child in self._open_children():
                    self._send_all(self._sender, child)
                child = None
                self._send_all(self._sender, self.root)  # its end, after its children's
            self.problem = None
            self.root.save()
        except Exception as error:  # of MLflow, the network, the disk: there is nobody to raise it to
            self.problem = reason(error, uri)
            if child is not None:  # the others go first next time, should it be this one's fault
                self.children[child.folder] = self.children.pop(child.folder)
            with contextlib.suppress(OSError):
                self.root.save(self.problem)

    def _send_all(self, sender: Sender, journal: Journal, keep: int = 0) -> None:
        parent = None if journal is self.root else self.root.run_id
        while len(journal.waiting) > keep:
            entry = journal.waiting[0]
            try:
                sender.send(journal, entry, parent)
            except Exception as error:
                if entry.event["event"] == "run" or not is_permanent(error):
                    raise
                self._refuse(error)
            journal.sent()
            self.progress += 1
            if self.problem is not None:
                self.problem = None
                self.root.save()
            journal.save()

    def _refuse(self, error: Exception) -> None:
        self.refused.append(reason(error))
        say(self.refused[-1])

    def name_results(self) -> None:
        """Let the results of ended jobs name their runs in MLflow."""
        for child in self.children.values():
            if child.ended and child.run_id is not None:
                name_result(child.folder, child.run_id)


def name_result(folder: Path, run_id: str) -> None:
    """Let `result.json` say MLflow's id of the run, unless somebody holds the folder."""
    from filelock import FileLock, Timeout

    if read_json(folder / "result.json").get("run_id", run_id) == run_id:
        return
    with contextlib.suppress(Timeout, OSError), FileLock(folder / ".lock", timeout=0):
        if result := read_json(folder / "result.json"):
            write_whole(folder / "result.json", json.dumps(result | {"run_id": run_id}, indent=2) + "\n")


def follow(folder: Path, writer: int, allowed_targets: Sequence[str] = USUAL_TARGETS) -> Delivery:
    """Send all that is and will be written, until the journal ends or its writer dies; what came of it."""
    delivery = Delivery(folder, allowed_targets)
    pause, again = 0.0, 0.0
    over = failing = None  # since when, in monotonic seconds
    while True:
        alive = os.getppid() == writer  # before reading, so that its last words are read
        delivery.read()
        if over is None and (delivery.root.ended or not alive):
            over, again = time.monotonic(), 0.0
        if time.monotonic() >= again:
            before = delivery.progress
            delivery.send(orphaned=not alive)
            now = time.monotonic()
            if delivery.problem is None:
                pause, failing = 0.0, None
            elif failing is None or delivery.progress > before:
                pause, failing = PAUSE_S, now
            else:
                pause = min(2 * pause, LONGEST_PAUSE_S if over is None else PAUSE_S)
            again = now + pause
        if not delivery.root.ended and alive:  # gone on with after an end
            over = None
        if over is not None:
            someone_else = not alive and not delivery.root.ended and delivery.problem is None
            if delivery.is_complete or someone_else:
                break
            if failing is not None and time.monotonic() - max(failing, over) > GIVE_UP_S:
                break
        time.sleep(0.1)
    delivery.name_results()
    return delivery


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the disk is full
        print(text, file=sys.stderr, flush=True)


def main(folder: Path, writer: int, allowed_targets: Sequence[str] = USUAL_TARGETS) -> int:
    from filelock import FileLock

    try:
        with FileLock(folder / ".mlflow.lock"):  # an earlier sender of this folder may still be at the end of its work
            delivery = follow(folder, writer, allowed_targets)
    except Exception as error:
        say(reason(error))
        return 1
    if delivery.problem is not None:
        say(delivery.problem)
    elif len(delivery.refused) > 1:
        say(f"{delivery.refused[0]} (and {len(delivery.refused) - 1} more)")
    return int(bool(delivery.problem or delivery.refused))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")))
